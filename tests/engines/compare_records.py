"""Synthetic records of comparisons, as engines/compare writes them: every branch that figures and reports meet."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.metrics import METRICS, percentile

THIRTEEN = (
    "baseline", "larosa", "vattention", "int8", "int4", "bnb_int8", "bnb_nf4", "word_removal", "hybrid_kv_cache", "adaptivocab", "chai", "mpo", "all_combined",
)
EXTRA = {
    "keyword_recall": ("Share of the query's keywords found in the answer.", "share", "high", "Keyword recall"),
    "rouge_l": ("ROUGE-L F1 against the baseline's answer.", "share", "high", "ROUGE-L"),
    "distinct_2": ("Distinct bigrams / bigrams.", "share", "high", "Distinct bigrams"),
    "repetition_rate": ("1 - distinct runs of four words / such runs.", "share", "low", "Repetition"),
}
DEFINITIONS = {
    **{n: {k: m[k] for k in ("definition", "unit", "better", "title")} for n, m in METRICS.items()},
    **{n: dict(zip(("definition", "unit", "better", "title"), v, strict=True)) for n, v in EXTRA.items()},
}
WORDS = ["a", "model", "learns", "from", "many", "examples", "and", "finds", "patterns", "in", "data", "so", "that", "it", "can", "answer", "questions", "about", "new", "text", "with", "care"]
MIB = 2**20


@dataclass
class Recipe:
    """What the record is to hold. failing: method -> reason, every answer fails. one_fails: methods whose first answer fails.

    unmeasured: method -> metrics that are None. pending: methods not run yet. texts: (method, query) -> text of every repeat.
    """

    methods: Sequence[str] = ("baseline", "int8", "larosa")
    models: Sequence[str] = ("embedded",)
    queries: int = 2
    repeats: int = 1
    seed: int = 0
    failing: Mapping[str, str] = field(default_factory=dict)
    one_fails: Sequence[str] = ()
    unmeasured: Mapping[str, Sequence[str]] = field(default_factory=dict)
    pending: Sequence[str] = ()
    texts: Mapping[tuple[str, str], str] = field(default_factory=dict)
    figures: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # method -> metric -> value in every cell


def _metrics(rng: random.Random, method: str, place: int, text: str, scale: float) -> dict[str, Any]:
    speed = scale * rng.uniform(0.9, 1.1) * (100 + 45 * place)
    tokens = max(2, len(text.split()) * 4 // 3)
    base = method == "baseline"
    weights = int(25 * MIB * scale / (1 + 0.3 * (place % 4)))
    return {
        "ttft_s": rng.uniform(0.01, 0.03) / scale, "tpot_median_s": 1 / speed, "tpot_p90_s": 1.2 / speed, "total_s": tokens / speed + 0.02, "prefill_tok_s": rng.uniform(800, 1200),
        "decode_tok_s": speed, "chars_s": 4.2 * speed, "prompt_tokens": 15, "prompt_tokens_unfiltered": 15, "output_tokens": tokens, "output_chars": len(text),
        "weights_in_use_bytes": weights, "weights_kept_for_undo_bytes": 0 if base else 5 * MIB, "weights_packed_bytes": 0 if base else weights // 2,
        "kv_in_use_bytes": 12288 * tokens, "kv_committed_bytes": 65536 * (1 + tokens // 5), "kv_reserved_bytes": 2**25, "peak_rss_bytes": int(1.1e9),
        "chars_s_per_gib": 4.2 * speed * 2**30 / weights, "baseline_answer_bits_per_byte": 0.004 if base else 0.004 + 0.02 * place * rng.uniform(0.5, 1.5),
        "agreement_tokens": tokens if base else tokens // 2, "agreement_share": 1.0 if base else rng.uniform(0.1, 0.9),
        "finish_reason": rng.choice(("eos", "length")), "times_comparable": True, "dtype": "bfloat16",
        "keyword_recall": rng.choice((0.2, 0.5, 0.75, 1.0)), "rouge_l": 1.0 if base else rng.uniform(0.2, 0.9), "distinct_2": rng.uniform(0.8, 1.0), "repetition_rate": rng.uniform(0, 0.1),
    }


def _text(rng: random.Random, query: str, method: str) -> str:
    words = random.Random(query).choices(WORDS, k=24)
    if method != "baseline":
        words[rng.randrange(4, 20):] = rng.choices(WORDS, k=rng.randrange(3, 30))
    return " ".join(words).capitalize() + "."


def _cell(recipe: Recipe, model: int, place: int, query: int, repeat: int) -> dict[str, Any]:
    method, name = recipe.methods[place], f"q{query}"
    rng = random.Random(f"{recipe.seed} {model} {method} {query} {repeat}")
    cell: dict[str, Any] = {
        "model": recipe.models[model], "method": method, "query": name, "repeat": repeat, "status": "done", "error": None, "text": "", "prompt": "", "prompt_sha256": None,
        "metrics": {}, "token_gaps_s": [], "reports": [],
    }
    if method in recipe.pending:
        return {**cell, "status": "pending"}
    if method in recipe.failing or (method in recipe.one_fails and query == 0 and repeat == 0):
        return {**cell, "status": "failed", "error": recipe.failing.get(method, "Memory ran out while answering.")}
    text = recipe.texts.get((method, name), _text(random.Random(f"{method} {query}"), name, method))
    metrics = {**_metrics(rng, method, place, text, 1 / (1 + model)), **recipe.figures.get(method, {})}
    metrics |= dict.fromkeys(recipe.unmeasured.get(method, ()))
    gaps = [rng.uniform(0.8, 1.3) / (metrics["decode_tok_s"] or 100) for _ in range(20)]
    reports = [] if method == "baseline" else [{
        "technique": method, "label": "stored", "touched": ["model.layers.0"], "skipped": {"lm_head": "tied"}, "bytes_before": 4, "bytes_after": 1, "notes": [],
    }]
    return {**cell, "text": text, "prompt": f"Question {query}?", "prompt_sha256": f"{query:064x}", "metrics": metrics, "token_gaps_s": gaps, "reports": reports}


def _row(model: str, method: str, cells: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done, failed = ([c for c in cells if c["status"] == s] for s in ("done", "failed"))
    metrics = {}
    for name in DEFINITIONS:
        values = [v for c in done if isinstance(v := c["metrics"].get(name), (int, float)) and not isinstance(v, bool)]
        if values:
            metrics[name] = {"median": statistics.median(values), "p10": percentile(values, 0.1), "p90": percentile(values, 0.9), "n": len(values)}
    return {
        "model": model, "method": method, "label": "reference" if method == "baseline" else "stored" if done else None,
        "error": failed[0]["error"] if failed and not done else None, "done": len(done), "failed": len(failed), "metrics": metrics,
    }


def make_record(recipe: Recipe | None = None, **changes: Any) -> dict[str, Any]:
    """A record of the recipe; its rows are aggregated from its cells."""
    recipe = recipe or Recipe(**changes)
    cells = [
        _cell(recipe, m, p, q, r)
        for m in range(len(recipe.models)) for r in range(recipe.repeats) for q in range(recipe.queries) for p in range(len(recipe.methods))
    ]
    return {
        "format": 1, "date": "2026-11-26", "complete": not recipe.pending,
        "settings": {
            "methods": list(recipe.methods), "models": list(recipe.models), "repeats": recipe.repeats, "max_new_tokens": 64, "seed": 0, "temperature": 0.0, "top_p": 1.0,
            "top_k": 0, "repetition_penalty": 1.0, "dtype": "auto", "device": "cpu", "quick": False,
        },
        "queries": [{"id": f"q{q}", "kind": "definition", "question": f"What is question number {q} about?", "keywords": ["data"]} for q in range(recipe.queries)],
        "methods": [{
            "method": m, "spelled": "larosa+vattention" if m == "all_combined" else m, "members": ["larosa", "vattention"] if m == "all_combined" else [],
            "excluded": {"bnb_int8": "replaces the same weights as int8"} if m == "all_combined" else {},
        } for m in recipe.methods],
        "models": [{"model_id": m, "revision": "ffa7157f", "dtype": "bfloat16", "source": "embedded", "dtype_choice": None} for m in recipe.models],
        "cells": cells,
        "rows": [_row(m, name, [c for c in cells if (c["model"], c["method"]) == (m, name)]) for m in recipe.models for name in recipe.methods],
        "definitions": DEFINITIONS,
        "provenance": {"packages": {"torch": "2.13.0"}, "python": "3.11", "commit": "abc+", "cpu": "AMD EPYC", "cpu_cores": 2, "gpu": None, "threads": 2, "memory_bytes": 2**33},
    }
