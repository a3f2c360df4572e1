"""Every method on the embedded model over a few questions, ABBA order: `python -m benchmarks.chat [--json PATH]`.

The last line printed is one JSON object; the whole result goes to benchmarks/results/chat-embedded.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import statistics
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from core.files import write_text
from core.provenance import provenance
from engines.catalog import TECHNIQUES
from engines.chat import ChatRequest, ChatService, collect
from engines.engine import Answer
from engines.export import to_json
from engines.methods import BASELINE
from engines.metrics import percentile
from engines.pool import EnginePool
from engines.sampling import Sampling

RESULT = Path(__file__).resolve().parent / "results" / "chat-embedded.json"
QUESTIONS = (
    "What is artificial intelligence?",
    "Explain quantum mechanics in simple terms.",
    "How does machine learning work?",
    "Summarise this text: The greenhouse effect keeps the Earth warm. Sunlight heats the ground, and the ground sends heat back as infrared "
    "radiation. Gases such as carbon dioxide and water vapor absorb part of that heat and return some of it to the surface.",
)


METHODS = (BASELINE, *TECHNIQUES, "native+int8", "native+int4", "native+larosa", "native+int8+larosa")
QUALITY = ("baseline_answer_bits_per_byte", "agreement_tokens", "agreement_share")


def measure_quality(service: ChatService, model: str, new_tokens: int) -> dict[str, list[Answer]]:
    """Answers that end where the model ends them, scored against the baseline's."""
    methods = METHODS
    answers: dict[str, list[Answer]] = {m: [] for m in methods}
    for question in QUESTIONS:
        done, _ = collect(service.stream(ChatRequest(question, methods, model_id=model, sampling=Sampling(2 * new_tokens), reuse=False)))
        for method, answer in done.items():
            answers[method].append(answer)
    return answers


def measure_speed(model: str, new_tokens: int, rounds: int) -> tuple[dict[str, list[Answer]], dict[str, str], ChatService]:
    """Answers of a fixed length by method: each round asks every question of every method, alternating the order of the methods."""
    service = ChatService(EnginePool())
    methods = METHODS
    answers: dict[str, list[Answer]] = {m: [] for m in methods}
    errors: dict[str, str] = {}
    for round_ in range(rounds + 1):  # the first warms up
        for place, question in enumerate(QUESTIONS):
            request = ChatRequest(question, methods, model_id=model, sampling=Sampling(new_tokens, ignore_eos=True), score=False, reuse=False,
                                  reverse=(round_ + place) % 2 == 1)
            done, failed = collect(service.stream(request))
            errors.update(failed)
            for method, answer in done.items() if round_ else ():
                answers[method].append(answer)
            print(f"round {round_} of {rounds}, question {place + 1}", file=sys.stderr, flush=True)
    return answers, errors, service


def _row(method: str, answers: list[Answer], quality: list[Answer], error: str | None) -> dict[str, Any]:
    if error or not answers:
        return {"method": method, "error": error or "no answer"}
    metrics = [asdict(a.metrics) for a in answers]
    values = {name: [m[name] for m in metrics if isinstance(m[name], (int, float)) and not isinstance(m[name], bool)] for name in metrics[0]}
    for name in QUALITY:
        values[name] = [v for a in quality if (v := getattr(a.metrics, name)) is not None]
    labels = [r.label.value for r in answers[0].reports]
    return {
        "method": method, "label": labels[0] if labels else None,
        "median": {name: statistics.median(v) if v else None for name, v in values.items()},
        "decode_tok_s_p10": percentile(values["decode_tok_s"], 0.1), "decode_tok_s_p90": percentile(values["decode_tok_s"], 0.9),
        "raw": {name: values[name] for name in ("decode_tok_s", "ttft_s", "prompt_tokens")},
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=RESULT)
    options = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)
    answers, errors, service = measure_speed(options.model, options.new_tokens, options.rounds)
    quality = measure_quality(service, options.model, options.new_tokens)
    choice = service.pool.dtype_choice(options.model)
    base = service.pool.get(options.model).bundle.info
    data = {
        "rows": [_row(m, a, quality[m], errors.get(m)) for m, a in answers.items()], "answers_per_method": options.rounds * len(QUESTIONS),
        "new_tokens": options.new_tokens, "date": datetime.date.today().isoformat(), "provenance": provenance(),
        "model": {"model_id": base.model_id, "revision": base.revision, "dtype": base.dtype, "dtype_reason": choice.reason if choice else "as asked for"},
    }
    write_text(options.json, to_json(data))
    print(json.dumps({r["method"]: r.get("median", {}).get("decode_tok_s") for r in data["rows"]}))


if __name__ == "__main__":
    main()
