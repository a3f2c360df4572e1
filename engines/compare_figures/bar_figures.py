"""Figures made of bars: time, tokens, memory, efficiency, quality, and the nine panels of all of them."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from engines.compare_figures.bars import NOTE, Bars
from engines.compare_figures.grid import panel_grid
from engines.compare_view import ModelView, definition

TIME = (("ttft_s", "tpot_median_s"), ("total_s", "prefill_tok_s"))
TOKENS = (("prompt_tokens", "prompt_tokens_unfiltered"), ("output_tokens", "output_chars"))
MEMORY = (
    ("weights_in_use_bytes", "weights_packed_bytes", "weights_kept_for_undo_bytes"), ("kv_in_use_bytes", "kv_committed_bytes", "kv_reserved_bytes"), ("peak_rss_bytes",),
)
QUALITY = (("baseline_answer_bits_per_byte", "agreement_share"), ("rouge_l", "keyword_recall"), ("distinct_2", "repetition_rate"))
ALL_NINE = (
    ("ttft_s", "tpot_median_s", "decode_tok_s"), ("weights_in_use_bytes", "kv_committed_bytes", "chars_s_per_gib"),
    ("baseline_answer_bits_per_byte", "agreement_share", "keyword_recall"),
)


def bar_figure(view: ModelView, title: str, metrics: Sequence[Sequence[str]], sort_by: str, notes: Sequence[str] = ()) -> Figure:
    """A panel for each metric, methods sorted by one of them."""
    return panel_grid(view, title, [[Bars(m) for m in row] for row in metrics], view.sorted_methods(sort_by), [NOTE, *notes])


def time_metrics(view: ModelView) -> Figure:
    """Time to the first token, per token and in all, and the speed of the prefill."""
    return bar_figure(view, "Time", TIME, "tpot_median_s")


def token_metrics(view: ModelView) -> Figure:
    """Tokens in and out."""
    return bar_figure(view, "Tokens", TOKENS, "prompt_tokens")


def memory_metrics(view: ModelView) -> Figure:
    """Weights, KV cache, and the process's peak."""
    return bar_figure(view, "Memory", MEMORY, "weights_in_use_bytes", [definitions_note(view, ("peak_rss_bytes",))])


def efficiency_metrics(view: ModelView) -> Figure:
    """Speed for the memory it takes; the fraction of the bandwidth where the record has it."""
    bandwidth = tuple(sorted({m for r in view.rows for m in r.metrics if "bandwidth" in m}))
    metrics = [("chars_s_per_gib",), ("decode_tok_s", "chars_s"), *((m,) for m in bandwidth)]
    missing = [] if bandwidth else ["Fraction of the memory bandwidth: not measured in this run."]
    return bar_figure(view, "Efficiency", metrics, "chars_s_per_gib", [definitions_note(view, ("chars_s_per_gib", *bandwidth)), *missing])


def quality_comparison(view: ModelView) -> Figure:
    """How far answers are from the baseline's, and what they hold."""
    return bar_figure(view, "Quality", QUALITY, "baseline_answer_bits_per_byte", [definitions_note(view, ("baseline_answer_bits_per_byte", "agreement_share"))])


def comprehensive_dashboard(view: ModelView) -> Figure:
    """Nine panels: time, memory and efficiency, quality."""
    return bar_figure(view, "Time, memory and quality", ALL_NINE, "decode_tok_s", [definitions_note(view, ("chars_s_per_gib", "baseline_answer_bits_per_byte"))])


def definitions_note(view: ModelView, metrics: Sequence[str]) -> str:
    """Titles with their definitions, in one line of text."""
    found = {m: definition(view.record, m) for m in metrics}
    return " ".join(f"{d['title']}: {d['definition']}" for d in found.values() if d["definition"])
