/* A whole decode step in one call: a list of operations run by all threads together, one to four tokens at a time.
 *
 * Values lie in two arenas of floats: the shared one, whose entries one thread writes and others read, and one of each
 * thread's own for what is cheaper to compute twice than to wait for (norms, Top-K). An operand is an offset into the shared
 * arena, or minus one minus an offset into the thread's own. Token t of an operand stands t * stride further.
 * An operation marked `wait` starts when every thread has finished what stands before it.
 */
#include "fusebox.h"
#include "vector.h"
#include <omp.h>
#include <sched.h>
#include <stdatomic.h>
#if defined(__x86_64__)
#include <immintrin.h>
#define PAUSE() _mm_pause()
#else
#define PAUSE() ((void)0)
#endif

#define SPINS 4000 /* looks at a barrier before the core is offered to others */

enum { EMBED, ADD_ROW, NORM, SELECT, GEMV, ROTATE, HEAD_NORM, APPEND, ATTEND, ACTIVATE, PART, JOIN };
enum { TOP_K, ABOVE, NONZERO };

/* One operation; which fields it reads stands at its function. */
struct operation {
    int64_t kind, wait, stride;
    int64_t from, to, gated;             /* operands */
    int64_t rows, counts;                /* of the thread's own integers; rows < 0: all channels */
    int64_t n, heads, head_stride, dim;  /* sizes */
    int64_t layer, window, mode, keep, exempt, offset, add, together;
    float factor, eps;
    const void *table;
    const float *gain, *shift;
    struct matrix matrix;
    int64_t kept; /* rows kept since it was reset, by thread 0 */
};

struct step {
    struct operation *operations;
    struct cached *layers;
    float *shared, *own;
    int32_t *own_rows;
    float *scores; /* one piece of `score_room` a thread */
    int64_t operation_count, own_stride, own_rows_stride, score_room, threads;
    const int64_t *tokens;
    int64_t token_count, position;
};

struct barrier {
    _Atomic int64_t arrived, round;
};

static void meet(struct barrier *b, int64_t threads) {
    int64_t round = atomic_load_explicit(&b->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&b->arrived, 1, memory_order_acq_rel) == threads - 1) {
        atomic_store_explicit(&b->arrived, 0, memory_order_relaxed);
        atomic_store_explicit(&b->round, round + 1, memory_order_release);
        return;
    }
    for (int64_t spin = 0; atomic_load_explicit(&b->round, memory_order_acquire) == round; spin++) {
        if (spin < SPINS) PAUSE();
        else sched_yield();
    }
}

struct worker {
    const struct step *s;
    int64_t index;
    float *own;
    int32_t *rows;
    float *scores;
};

static inline float *at(const struct worker *w, int64_t operand) { return operand >= 0 ? w->s->shared + operand : w->own + (-1 - operand); }

/* This thread's share of n pieces. */
static inline void share(const struct worker *w, int64_t n, int64_t *first, int64_t *last) {
    *first = n * w->index / w->s->threads;
    *last = n * (w->index + 1) / w->s->threads;
}

/* to[n] = factor * table[token]; mode is the table's dtype. */
static void embed(const struct worker *w, const struct operation *o) {
    for (int64_t t = 0; t < w->s->token_count; t++) {
        float *to = at(w, o->to) + t * o->stride;
        int64_t row = w->s->tokens[t] * o->n, first, last;
        share(w, o->n, &first, &last);
        for (int64_t i = first; i < last; i++)
            to[i] = o->factor * (o->mode == FLOAT32 ? ((const float *)o->table)[row + i] : one_bf16((const uint16_t *)o->table + row + i));
    }
}

/* to[n] += table[position + offset]: learned positions. */
static void add_row(const struct worker *w, const struct operation *o) {
    for (int64_t t = 0; t < w->s->token_count; t++) {
        float *to = at(w, o->to) + t * o->stride;
        int64_t row = (w->s->position + t + o->offset) * o->n, first, last;
        share(w, o->n, &first, &last);
        for (int64_t i = first; i < last; i++)
            to[i] += o->mode == FLOAT32 ? ((const float *)o->table)[row + i] : one_bf16((const uint16_t *)o->table + row + i);
    }
}

/* Every thread for itself: to[n] = norm(from[n]); add: centred. */
static void normalise(const struct worker *w, const struct operation *o) {
    for (int64_t t = 0; t < w->s->token_count; t++)
        fusebox_norm(at(w, o->to) + t * o->stride, at(w, o->from) + t * o->stride, o->gain, o->shift, 1, o->n, o->eps, o->add);
}

/* Every thread for itself: which channels of from[n] are read, by mode; all of them at positions below `exempt`. */
static void choose_rows(const struct worker *w, struct operation *o) {
    for (int64_t t = 0; t < w->s->token_count; t++) {
        const float *x = at(w, o->from) + t * o->stride;
        int32_t *rows = w->rows + o->rows + t * (o->n + 1);
        int64_t count;
        if (w->s->position + t < o->exempt) count = fusebox_largest(rows, x, o->n, o->n);
        else if (o->mode == TOP_K) count = fusebox_largest(rows, x, o->n, o->keep);
        else if (o->mode == ABOVE) count = fusebox_above(rows, x, o->n, o->factor);
        else count = fusebox_nonzero(rows, x, o->n);
        w->rows[o->counts + t] = (int32_t)count;
        if (!w->index) o->kept += count;
    }
}

/* to = factor * (W from + bias), or added to it. `together` products that stand next to each other share out their blocks. */
static void multiply(const struct worker *w, const struct operation *o) {
    int64_t total = 0, first, last, start = 0;
    for (int64_t i = 0; i < o->together; i++) total += (o[i].matrix.out + BLOCK - 1) / BLOCK;
    share(w, total, &first, &last);
    for (int64_t i = 0; i < o->together; i++) {
        const struct operation *p = o + i;
        int64_t blocks = (p->matrix.out + BLOCK - 1) / BLOCK;
        int64_t from = first > start ? first - start : 0, to = last - start < blocks ? last - start : blocks;
        start += blocks;
        if (from >= to) continue;
        float *y = at(w, p->to), *x = at(w, p->from);
        if (p->rows < 0) {
            fusebox_gemv_blocks(&p->matrix, y, p->stride, x, p->n, 0, p->matrix.in, w->s->token_count, from, to, p->factor, p->add);
            continue;
        }
        for (int64_t t = 0; t < w->s->token_count; t++)
            fusebox_gemv_blocks(&p->matrix, y + t * p->stride, 0, x + t * p->n, 0, w->rows + p->rows + t * (p->matrix.in + 1), w->rows[p->counts + t], 1, from, to, p->factor, p->add);
    }
}

/* Sums over this thread's part of the input channels, for join: to[thread][token][head_stride]. */
static void multiply_part(const struct worker *w, const struct operation *o) {
    const struct matrix *m = &o->matrix;
    float *x = at(w, o->from), *sums = w->s->shared + o->to + w->index * MOST_TOKENS * o->head_stride;
    int64_t first, last;
    if (o->rows < 0) {
        share(w, m->in, &first, &last);
        fusebox_gemv_part(m, sums, o->head_stride, x, o->stride, 0, first, last, w->s->token_count);
        return;
    }
    for (int64_t t = 0; t < w->s->token_count; t++) {
        share(w, w->rows[o->counts + t], &first, &last);
        fusebox_gemv_part(m, sums + t * o->head_stride, 0, x + t * o->stride, 0, w->rows + o->rows + t * (m->in + 1), first, last, 1);
    }
}

/* to[n] = factor * (gain * the parts' sums + shift), or added to it; in `heads` pieces, or in any where that is 0. */
static void join(const struct worker *w, const struct operation *o) {
    int64_t piece = o->heads ? o->n / o->heads : LANES, first, last;
    share(w, (o->n + piece - 1) / piece, &first, &last);
    first *= piece, last = last * piece < o->n ? last * piece : o->n;
    for (int64_t t = 0; t < w->s->token_count; t++)
        fusebox_join(at(w, o->to) + t * o->stride, w->s->shared + o->from + t * o->head_stride, w->s->threads, MOST_TOKENS * o->head_stride, o->gain, o->shift, first, last, o->factor, o->add);
}

/* Rotary positions of from[heads][dim], head_stride apart, in place: keep channels turn; table: cosines, gain: sines, [position][keep / 2]. */
static void rotate(const struct worker *w, const struct operation *o) {
    int64_t first, last;
    share(w, o->heads, &first, &last);
    for (int64_t t = 0; t < w->s->token_count; t++) {
        int64_t row = (w->s->position + t) * (o->keep / 2);
        for (int64_t h = first; h < last; h++)
            fusebox_rope(at(w, o->from) + t * o->stride + h * o->head_stride, (const float *)o->table + row, o->gain + row, 1, o->dim, o->keep);
    }
}

/* Norm of each head of from[heads][dim], in place. */
static void head_norm(const struct worker *w, const struct operation *o) {
    int64_t first, last;
    share(w, o->heads, &first, &last);
    for (int64_t t = 0; t < w->s->token_count; t++)
        for (int64_t h = first; h < last; h++) {
            float *x = at(w, o->from) + t * o->stride + h * o->head_stride;
            fusebox_norm(x, x, o->gain, o->shift, 1, o->dim, o->eps, o->add);
        }
}

/* Heads of from go to the layer's keys, or values when mode is 1. */
static void append(const struct worker *w, const struct operation *o) {
    int64_t first, last;
    share(w, o->heads, &first, &last);
    for (int64_t t = 0; t < w->s->token_count; t++)
        for (int64_t h = first; h < last; h++)
            fusebox_append(w->s->layers + o->layer, o->mode, w->s->position + t, h, at(w, o->from) + t * o->stride + h * o->head_stride);
}

static void attend(const struct worker *w, const struct operation *o) {
    const struct cached *kv = w->s->layers + o->layer;
    int64_t first, last;
    share(w, o->heads, &first, &last);
    for (int64_t t = 0; t < w->s->token_count; t++) {
        int64_t length = w->s->position + t + 1, start = o->window && length > o->window ? length - o->window : 0;
        fusebox_attend(at(w, o->to) + t * o->stride + first * kv->dim_v, at(w, o->from) + t * o->stride + first * o->head_stride, o->head_stride, kv, first, last, o->heads, start, length,
                       o->factor, w->scores);
    }
}

static void activate(const struct worker *w, const struct operation *o) {
    int64_t first, last, pieces = (o->n + LANES - 1) / LANES;
    share(w, pieces, &first, &last);
    first *= LANES, last = last * LANES < o->n ? last * LANES : o->n;
    if (first >= last) return;
    for (int64_t t = 0; t < w->s->token_count; t++) {
        const float *gated = o->gated ? at(w, o->gated) + t * o->stride + first : 0;
        fusebox_activate(at(w, o->to) + t * o->stride + first, at(w, o->from) + t * o->stride + first, gated, last - first, o->mode);
    }
}

static void work(const struct step *s, int64_t index, struct barrier *barrier) {
    struct worker w = {s, index, s->own + index * s->own_stride, s->own_rows + index * s->own_rows_stride, s->scores + index * s->score_room};
    for (int64_t i = 0; i < s->operation_count; i++) {
        struct operation *o = s->operations + i;
        if (o->wait && s->threads > 1) meet(barrier, s->threads);
        switch (o->kind) {
        case EMBED: embed(&w, o); break;
        case ADD_ROW: add_row(&w, o); break;
        case NORM: normalise(&w, o); break;
        case SELECT: choose_rows(&w, o); break;
        case GEMV: multiply(&w, o), i += o->together - 1; break;
        case ROTATE: rotate(&w, o); break;
        case HEAD_NORM: head_norm(&w, o); break;
        case APPEND: append(&w, o); break;
        case ATTEND: attend(&w, o); break;
        case PART: multiply_part(&w, o); break;
        case JOIN: join(&w, o); break;
        default: activate(&w, o);
        }
    }
}

/* Returns the threads that ran. */
int64_t fusebox_step(struct step *s) {
    struct barrier barrier = {0, 0};
    if (s->threads == 1) {
        work(s, 0, &barrier);
        return 1;
    }
    int64_t ran = 0;
    _Pragma("omp parallel num_threads((int)s->threads)")
    {
        _Pragma("omp single")
        {
            ran = omp_get_num_threads();
            s->threads = ran; /* fewer where the system gives fewer */
        }
        work(s, omp_get_thread_num(), &barrier);
    }
    return ran;
}

int64_t fusebox_operation_bytes(void) { return (int64_t)sizeof(struct operation); }
int64_t fusebox_step_bytes(void) { return (int64_t)sizeof(struct step); }
