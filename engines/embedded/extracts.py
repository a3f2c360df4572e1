"""Extractive summaries: what the chat model learns to copy from a text, and the baseline that its summaries are compared with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from core.datasets import Document

_SENTENCE = re.compile(r"(?<=[.!?])\s+(?=[A-Z\"'])")
_STOP = frozenset(re.findall(
    "[a-z]+",
    "a an and are as at be been but by can do does for from had has have how if in into is it its may more most no not of on one or "
    "other our out over so some such than that the their them then there these they this those through to two under up was we were what "
    "when where which while who why will with would you your "
))


def sentences(text: str) -> list[str]:
    """The sentences of a paragraph, by end marks before a capital letter."""
    return [s for s in _SENTENCE.split(" ".join(text.split())) if s]


def content_words(text: str) -> list[str]:
    """Lower-case words that carry meaning."""
    return [w for w in re.findall(r"[a-z0-9']+", text.lower()) if w not in _STOP and len(w) > 2]


def extract(text: str, share: float = 0.48) -> str:
    """The first sentence and those that share most of their words with the rest, in order, in at most `share` of the words.

    Falls back to the first sentence alone where nothing else fits, and to the whole text where there is only one.
    """
    parts = sentences(text)
    counts = Counter(w for s in parts for w in set(content_words(s)))
    budget = share * len(text.split())

    def weight(place: int) -> float:
        words = set(content_words(parts[place]))
        return sum(counts[w] - 1 for w in words) / (len(words) + 4) if words else 0.0

    chosen, used = [0], len(parts[0].split())
    for place in sorted(range(1, len(parts)), key=weight, reverse=True):
        length = len(parts[place].split())
        if used + length <= budget and length >= 6:
            chosen.append(place)
            used += length
    return " ".join(parts[i] for i in sorted(chosen))


def scrambled(text: str, rng: np.random.Generator) -> str:
    """The text's words in another order, in sentences as long as before: nothing but copying can continue it."""
    lengths = [len(s.split()) for s in sentences(text)]
    words = [w.rstrip(".!?") or w for w in text.split()]
    words = [words[i] for i in rng.permutation(len(words))]
    out = []
    for length in lengths:
        part, words = " ".join(words[:length]), words[length:]
        out.append(part[:1].upper() + part[1:] + ".")
    return " ".join(out)


def paragraphs(documents: Sequence[Document], low: int = 80, high: int = 170) -> Iterator[str]:
    """Runs of clean sentences of `low` to `high` words from documents: prose, no lists, code or tables."""
    for document in documents:
        run: list[str] = []
        length = 0
        for sentence in sentences(document.text[:6000]):
            count = len(sentence.split())
            clean = (
                6 <= count <= 40
                and sentence[0].isupper()
                and sentence[-1] in ".!?"
                and not re.search(r"[`{}<>|=\\#*_\[\]]|https?:", sentence)
            )
            if not clean or length + count > high:
                if length >= low and len(run) >= 4:
                    yield " ".join(run)
                run, length = [], 0
            if clean:
                run.append(sentence)
                length += count
        if length >= low and len(run) >= 4:
            yield " ".join(run)
