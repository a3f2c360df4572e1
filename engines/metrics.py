"""What is measured of one answer. `None` always means: not measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernels.kv_memory.cache import KVStats


def metric(definition: str, unit: str, better: str | None = None, title: str | None = None) -> Any:
    """A metric's field: definition shown as tooltip, unit, and which direction is better (low, high, or neither)."""
    return field(default=None, metadata={"definition": definition, "unit": unit, "better": better, "title": title})


@dataclass(frozen=True)
class ChatMetrics:
    """Metrics of one answer of one engine; `None` is a figure that was not measured."""

    ttft_s: float | None = metric("Time to first token: from the start of the engine's work (tokenising included) to the first token.", "s", "low", "Time to first token")
    tpot_median_s: float | None = metric("Time per output token: median gap between two tokens, first token left out.", "s", "low", "Time per token, median")
    tpot_p90_s: float | None = metric("90th percentile of the gaps between two tokens.", "s", "low", "Time per token, p90")
    total_s: float | None = metric("From the start of the engine's work to the last token.", "s", "low", "Total time")
    prefill_tok_s: float | None = metric("Prompt tokens that were read / time of the prefill; reused ones do not count.", "tok/s", "high", "Prefill speed")
    decode_tok_s: float | None = metric("(Output tokens - 1) / (last token - first token).", "tok/s", "high", "Decode speed")
    chars_s: float | None = metric("Characters of the answer / total time.", "chars/s", "high", "Characters per second")
    prompt_tokens: int | None = metric("Tokens the model was given, template included.", "tok", "low", "Prompt tokens")
    prompt_tokens_unfiltered: int | None = metric("Tokens the same prompt has before prompt techniques.", "tok", None, "Prompt tokens before filters")
    output_tokens: int | None = metric("Tokens of the answer.", "tok", None, "Output tokens")
    output_chars: int | None = metric("Characters of the answer.", "chars", None, "Output characters")
    weights_in_use_bytes: int | None = metric("Bytes of the weights this engine reads, tied and shared ones counted once.", "bytes", "low", "Weights in use")
    weights_kept_for_undo_bytes: int | None = metric("Original weights held only so that techniques can be undone.", "bytes", None, "Weights kept for undo")
    weights_packed_bytes: int | None = metric("The part of the weights in use that a technique stores in a smaller form.", "bytes", None, "Weights packed")
    kv_in_use_bytes: int | None = metric("Keys and values of the tokens in the cache.", "bytes", "low", "KV cache in use")
    kv_committed_bytes: int | None = metric("Physical memory that the cache takes; what it shares with other texts is counted apart.", "bytes", "low", "KV cache committed")
    kv_reserved_bytes: int | None = metric("Address space reserved for the cache; it costs nothing until it is committed.", "bytes", None, "KV cache reserved")
    kv_shared_bytes: int | None = metric("Pages of the cache that other texts with the same beginning use too: in memory once, however many use them.", "bytes", None, "KV cache shared")
    kv_waste_bytes: int | None = metric("Committed or shared and not used: ends of page groups, and pages kept from earlier texts.", "bytes", "low", "KV cache waste")
    kv_reused_tokens: int | None = metric("First tokens of the prompt that an earlier prompt began with, too: taken from memory, not computed again.", "tok", "high", "KV tokens reused")
    kv_faults_avoided: int | None = metric("Pages of the cache's tokens that were there before they were first written: shared, kept from an earlier text, or committed ahead.", "pages", "high", "KV page faults avoided")
    kv_pages_ahead: int | None = metric("Pages that a background thread committed off the critical path, while the model computed.", "pages", None, "KV pages committed ahead")
    kv_pages_waited: int | None = metric("Pages that the prefill or a decode step had to wait for.", "pages", "low", "KV pages waited for")
    peak_rss_bytes: int | None = metric("Highest resident memory of the whole process during this answer, all loaded engines included.", "bytes", None, "Peak resident memory")
    chars_s_per_gib: float | None = metric("Characters per second / GiB of (weights in use + KV cache in use).", "chars/s/GiB", "high", "Characters per second per GiB")
    baseline_answer_bits_per_byte: float | None = metric("Bits per byte of the baseline's answer under this engine, scored token by token as decode runs.", "bits/byte", "low", "Bits per byte of the baseline's answer")
    agreement_tokens: int | None = metric("Tokens shared with the baseline's answer before the first difference.", "tok", "high", "Tokens until divergence")
    agreement_share: float | None = metric("Shared tokens / tokens of the longer answer.", "share", "high", "Agreement with the baseline")
    rouge_l: float | None = metric("ROUGE-L F1 of the answer's words against the baseline's answer: from the longest common subsequence.", "share", "high", "ROUGE-L against the baseline")
    keyword_recall: float | None = metric("Expected keywords found in the answer / keywords of the query; the last two letters of a keyword of 7 letters or more need not match.", "share", "high", "Keywords found")
    distinct_2: float | None = metric("Different pairs of neighbouring words / all such pairs of the answer.", "share", "high", "Different word pairs")
    repetition_rate: float | None = metric("1 - different runs of four words / all such runs of the answer.", "share", "low", "Repetition")
    finish_reason: str | None = metric("eos: the model ended; length: max_new_tokens reached; stopped: Stop was pressed.", "", None, "Ended by")
    times_comparable: bool | None = metric("False when several engines ran at once and shared the cores.", "", None, "Times comparable")
    dtype: str | None = metric("Number format of the unpacked weights.", "", None, "Weights' dtype")


METRICS = {f.name: f.metadata for f in fields(ChatMetrics)}
GIB = 2**30


def percentile(values: Sequence[float], fraction: float) -> float | None:
    """Linear-interpolated percentile; None for no values."""
    if not values:
        return None
    ranked = sorted(values)
    place = fraction * (len(ranked) - 1)
    low = int(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


@dataclass(frozen=True)
class Timing:
    """Times of one answer in seconds of one clock: `began`, when prefill started and ended, and when each token came."""

    began_s: float
    prefill_began_s: float
    prefill_ended_s: float
    token_at_s: tuple[float, ...]

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Time between neighbouring tokens."""
        return tuple(b - a for a, b in zip(self.token_at_s, self.token_at_s[1:], strict=False))


def timing_metrics(timing: Timing, prompt_tokens: int, output_chars: int) -> dict[str, float | None]:
    """The time metrics that `timing` supports; one-token and empty answers leave the rest unmeasured."""
    tokens, gaps = timing.token_at_s, timing.gaps_s
    prefill_s = timing.prefill_ended_s - timing.prefill_began_s
    total = tokens[-1] - timing.began_s if tokens else None
    decode_s = tokens[-1] - tokens[0] if len(tokens) > 1 else 0.0
    return {
        "ttft_s": tokens[0] - timing.began_s if tokens else None,
        "tpot_median_s": statistics.median(gaps) if gaps else None,
        "tpot_p90_s": percentile(gaps, 0.9),
        "total_s": total,
        "prefill_tok_s": prompt_tokens / prefill_s if prefill_s > 0 else None,
        "decode_tok_s": (len(tokens) - 1) / decode_s if decode_s > 0 else None,
        "chars_s": output_chars / total if total else None,
    }


def reservation_metrics(stats: KVStats | None) -> dict[str, int]:
    """The metrics of a reserved KV cache; none for other caches."""
    if stats is None:
        return {}
    return {
        "kv_shared_bytes": stats.shared_bytes, "kv_waste_bytes": stats.waste_bytes, "kv_faults_avoided": stats.faults_avoided,
        "kv_pages_ahead": stats.ahead_pages, "kv_pages_waited": stats.waited_pages,
    }
