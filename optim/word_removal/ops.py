"""Which words of a text may go, and the text without them. Pure functions on strings."""

from __future__ import annotations

import re
from dataclasses import dataclass

NEGATIONS = frozenset(
    ["no", "not", "never", "none", "nothing", "nobody", "nowhere", "neither", "nor", "without", "cannot", "except", "unless", "hardly", "barely", "seldom", "rarely"]
)
NUMBER_WORDS = frozenset(
    ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety", "hundred", "thousand", "million", "billion", "trillion", "half", "third", "quarter", "twice"]
)
# Words that often open a sentence; any other capital there may be a name and stays.
COMMON_OPENERS = frozenset(
    ["a", "an", "the", "this", "that", "these", "those", "it", "its", "he", "she", "we", "you", "they", "i", "there", "here", "what", "how", "why", "when", "where", "who", "which", "whose", "in", "on", "at", "to", "of", "for", "from", "by", "with", "as", "if", "and", "but", "or", "so", "yet", "also", "then", "thus", "while", "although", "because", "since", "after", "before", "during", "many", "some", "most", "all", "each", "every", "both", "such", "other", "one", "can", "could", "will", "would", "should", "may", "might", "must", "is", "are", "was", "were", "do", "does", "did", "has", "have", "had", "be", "please", "explain", "describe", "summarise", "summarize", "tell", "give", "write", "list", "show"]
)
ABBREVIATIONS = frozenset(["mr.", "mrs.", "ms.", "dr.", "prof.", "st.", "vs.", "e.g.", "i.e.", "etc.", "fig.", "no.", "cf.", "al.", "jr.", "sr."])
_SENTENCE_END = re.compile(r"[.!?:;\u2026\u3002\uff01\uff1f][\"')\]\u201d\u2019]*$")
_PIECES = re.compile(r"\S+|\s+")
_FENCE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]*`)", re.DOTALL)


@dataclass(frozen=True)
class RemovalResult:
    """A text after removal. `removed` are the words left out, in order; `words` how many there were."""

    text: str
    words: int
    removed: tuple[str, ...]


def _edges(word: str) -> tuple[str, str, str]:
    """Opening marks, core, closing marks of a word."""
    inner = [place for place, char in enumerate(word) if char.isalnum() or char == "_"]
    return (word[: inner[0]], word[inner[0] : inner[-1] + 1], word[inner[-1] + 1 :]) if inner else (word, "", "")


def ends_sentence(word: str) -> bool:
    """True when a word closes a sentence; abbreviations do not."""
    return bool(_SENTENCE_END.search(word)) and word.lower() not in ABBREVIATIONS


def is_protected(word: str, starts_sentence: bool) -> bool:
    """True for a word that must stay: numbers, names, negations, ends of sentences, opened quotes, addresses."""
    opening, core, _ = _edges(word)
    if not core or opening or any(c.isdigit() for c in core) or ends_sentence(word):
        return True
    lower = core.lower().replace("\u2019", "'")
    if lower in NEGATIONS or lower in NUMBER_WORDS or word.lower() in ABBREVIATIONS or lower.endswith("n't"):
        return True
    if any(c in core for c in "/\\@_=<>{}"):
        return True
    is_name = core[0].isupper() and lower != "i" and not (starts_sentence and lower in COMMON_OPENERS)
    is_acronym = len(core) > 1 and core.isupper()
    return is_name or is_acronym


def remove_words(text: str, every: int, minimum_words: int = 0) -> RemovalResult:
    """Leave out every `every`-th word; where that word is protected, the next one that is not goes instead.

    Args:
        text: any text. Code between backticks stays as it is; line breaks stay.
        every: 3 leaves out a third of the words at most; 0 leaves the text alone.
        minimum_words: shorter texts stay whole.

    Returns:
        The text and what was left out. The same input gives the same output.
    """
    words = len(text.split())
    if every < 2 or words < minimum_words:
        return RemovalResult(text, words, ())
    kept: list[str] = []
    removed: list[str] = []
    since, starts_sentence = 0, True
    sections = _FENCE.split(text)
    for place, section in enumerate(sections):
        if place % 2:
            kept.append(section)
            continue
        pieces = _PIECES.findall(section)
        glued = {0} if place else set()  # words that touch code stay, or their neighbour would touch it instead
        if place + 1 < len(sections):
            glued.add(len(pieces) - 1)
        for index, piece in enumerate(pieces):
            if piece.isspace():
                if "\n" not in piece and removed and (not kept or kept[-1].endswith("\n")):
                    continue  # the first word of the line went
                starts_sentence = starts_sentence or "\n" in piece
                kept.append(piece)
                continue
            since += 1
            if since >= every and index not in glued and not is_protected(piece, starts_sentence):
                removed.append(piece)
                since = 0
                _drop(kept, piece)
            else:
                kept.append(piece)
            starts_sentence = ends_sentence(piece)
    return RemovalResult("".join(kept), words, tuple(removed))


def _drop(kept: list[str], word: str) -> None:
    """Leave `word` out of the text built so far: one blank goes with it, its trailing comma moves to the word before."""
    closing = _edges(word)[2]
    if kept and kept[-1].isspace() and "\n" not in kept[-1]:
        kept.pop()
    if closing and kept and kept[-1][-1:].isalnum():
        kept.append(closing)
