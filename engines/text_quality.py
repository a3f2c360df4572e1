"""Figures of an answer's text alone, over its words: keywords found, overlap with another text, repetition."""

from __future__ import annotations

import re
from collections.abc import Sequence

_WORD = re.compile(r"[^\W_]+")


def words_of(text: str) -> list[str]:
    """Lower-case runs of letters and digits, of any script."""
    return _WORD.findall(text.lower())


def keyword_recall(answer: str, keywords: Sequence[str]) -> float:
    """Share of keywords whose stem (all but the last two letters of long words) is in the answer; 0 without keywords."""
    text = answer.lower()
    hits = sum((k.lower()[:-2] if len(k) > 6 else k.lower()) in text for k in keywords)
    return hits / len(keywords) if keywords else 0.0


def rouge_l(candidate: str, reference: str) -> float:
    """ROUGE-L F1 over words (Lin 2004): from the longest common subsequence."""
    a, b = words_of(candidate), words_of(reference)
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], before + 1 if word == other else max(row[j], row[j - 1])
    common = row[-1]
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def distinct_share(text: str, length: int) -> float | None:
    """Different runs of `length` words / all such runs (distinct-n, Li et al. 2016); None for a text of fewer words."""
    words = words_of(text)
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    return len(set(runs)) / len(runs) if runs else None
