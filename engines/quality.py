"""How good an answer is: of its text alone, and against what the baseline answered. One place for chat and comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from core.evaluation import agreement, score_continuation
from core.progress import Stop
from engines.engine import Engine
from engines.text_quality import distinct_share, keyword_recall, rouge_l


class Answered(Protocol):
    """An answer as far as quality reads it."""

    @property
    def text(self) -> str: ...

    @property
    def token_ids(self) -> Sequence[int]: ...


def of_text(text: str, keywords: Sequence[str] = ()) -> dict[str, Any]:
    """Metrics of the text alone; None where there are no keywords, or too few words."""
    fours = distinct_share(text, 4)
    return {
        "keyword_recall": keyword_recall(text, keywords) if keywords else None,
        "distinct_2": distinct_share(text, 2),
        "repetition_rate": None if fours is None else 1 - fours,
    }


def of_answer(engine: Engine, prompt_ids: Sequence[int], answer: Answered, reference: Answered, stop: Stop) -> dict[str, Any]:
    """Metrics against the baseline's answer: overlap, tokens until the answers part, and how likely `engine` finds the baseline's answer.

    The score is of the tokens so far when `stop` is requested; throw it away then.
    """
    score = score_continuation(engine.bundle, prompt_ids, reference.token_ids, stop)
    shared, share = agreement(reference.token_ids, answer.token_ids)
    return {
        "baseline_answer_bits_per_byte": score.bits_per_byte, "agreement_tokens": shared, "agreement_share": share,
        "rouge_l": rouge_l(answer.text, reference.text),
    }
