"""The sentiment sentences: counted, balanced, varied, and nothing of the training split is found again in validation."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

FOLDER = Path(__file__).parents[2] / "assets" / "datasets" / "sentiment"
SMALLEST = {"train": 3000, "validation": 1500}
SPLITS = tuple(SMALLEST)

MOST_FREQUENT = """
    a an the this that these those some any no every each all both either neither one two another other such same
    i me my mine myself you your yours yourself he him his himself she her hers herself it its itself we us our ours ourselves
    they them their theirs themselves who whom whose which what something anything nothing everything someone anyone nobody everyone
    am is are was were be been being isn't aren't wasn't weren't i'm you're he's she's it's we're they're that's there's
    have has had having haven't hasn't hadn't i've you've we've they've i'd you'd he'd she'd it'd we'd they'd
    do does did doing done don't doesn't didn't can could cannot can't couldn't will would won't wouldn't i'll you'll it'll we'll they'll
    shall should shouldn't may might must mustn't get gets got getting go goes went going make makes made making
    and or but nor so yet if unless until while when where why how because since as than though although whereas whether
    of to in on at by for with from into onto about over under above below between among through during before after against
    without within along across behind beyond near off out up down around upon despite except like per toward towards
    not never nor n't hardly barely too very quite rather just only even still again also ever already almost always often
    once twice more most less least much many few little enough well then now here there first last next"""
FUNCTION_WORDS = frozenset(MOST_FREQUENT.split())
NEGATION = re.compile(r"\b(not|no|never|nothing|nobody|none|nor|neither|nowhere|without|hardly|barely|cannot)\b|n't\b")
CONTRAST = re.compile(r"\b(but|although|though|despite|yet|however|still|while|whereas|even if|except|otherwise|instead|rather than)\b")


def normalised(sentence: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+(?:'[^\W_]+)*", sentence.lower().replace("’", "'")))


def sixgrams(sentence: str) -> set[tuple[str, ...]]:
    words = normalised(sentence)
    return {words[at : at + 6] for at in range(len(words) - 5)}


def frame(sentence: str) -> tuple[str, ...] | None:
    """The sentence with each run of content words as one gap; None where too little is left to be a frame."""
    words = normalised(sentence)
    if len(words) < 6 or sum(word in FUNCTION_WORDS for word in words) < 4:
        return None
    gapped = [word if word in FUNCTION_WORDS else "_" for word in words]
    return (*gapped[:1], *(after for before, after in pairwise(gapped) if (before, after) != ("_", "_")))


def rows(split: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (FOLDER / f"{split}.jsonl").read_bytes().decode("utf-8").splitlines()]


@pytest.fixture(scope="module")
def sentences() -> dict[str, list[str]]:
    return {split: [str(row["sentence"]) for row in rows(split)] for split in SPLITS}


@pytest.fixture(scope="module")
def labels() -> dict[str, list[int]]:
    return {split: [int(str(row["label"])) for row in rows(split)] for split in SPLITS}


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_is_a_sentence_and_a_label_and_nothing_else(split: str) -> None:
    for row in rows(split):
        assert set(row) == {"sentence", "label"}, row
        assert isinstance(row["sentence"], str) and type(row["label"]) is int and row["label"] in (0, 1), row
        assert row["sentence"] == " ".join(row["sentence"].split()), row
        assert 3 <= len(row["sentence"].split()) <= 45, row


@pytest.mark.parametrize("split", SPLITS)
def test_there_are_enough_sentences_half_of_them_positive(split: str, labels: dict[str, list[int]]) -> None:
    assert len(labels[split]) >= SMALLEST[split]
    assert sum(labels[split]) / len(labels[split]) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("split", SPLITS)
def test_a_prefix_of_a_split_is_balanced_too(split: str, labels: dict[str, list[int]]) -> None:
    assert sum(labels[split][:400]) / 400 == pytest.approx(0.5, abs=0.06)


def test_no_sentence_occurs_twice(sentences: dict[str, list[str]]) -> None:
    count = Counter(normalised(sentence) for split in SPLITS for sentence in sentences[split])
    assert [" ".join(words) for words, times in count.items() if times > 1] == []


def test_no_six_words_in_a_row_are_shared_by_the_splits(sentences: dict[str, list[str]]) -> None:
    train, validation = (set().union(*map(sixgrams, sentences[split])) for split in SPLITS)
    assert {" ".join(words) for words in train & validation} == set()


def test_no_sentence_frame_is_shared_by_the_splits(sentences: dict[str, list[str]]) -> None:
    train, validation = ({frame(sentence) for sentence in sentences[split]} - {None} for split in SPLITS)
    assert {" ".join(words or ()) for words in train & validation} == set()


@pytest.mark.parametrize("split", SPLITS)
def test_negation_contrast_and_length_vary(split: str, sentences: dict[str, list[str]]) -> None:
    texts = [sentence.lower() for sentence in sentences[split]]
    assert sum(bool(NEGATION.search(text)) for text in texts) / len(texts) >= 0.12
    assert sum(bool(CONTRAST.search(text)) for text in texts) / len(texts) >= 0.10
    assert 8 <= median(len(text.split()) for text in texts) <= 20


def bag_of_words_accuracy(sentences: dict[str, list[str]], labels: dict[str, list[int]]) -> float:
    """Share of validation that a logistic regression on word counts gets right."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    words = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    words.fit(sentences["train"], labels["train"])
    return float(words.score(sentences["validation"], labels["validation"]))


def test_counting_words_learns_much_but_not_all(sentences: dict[str, list[str]], labels: dict[str, list[int]]) -> None:
    assert 0.70 <= bag_of_words_accuracy(sentences, labels) <= 0.97


def test_the_readme_states_the_counts_and_the_measured_accuracy(sentences: dict[str, list[str]], labels: dict[str, list[int]]) -> None:
    text = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    for split in SPLITS:
        share = sum(labels[split]) / len(labels[split])
        assert f"| `sentiment/{split}.jsonl` | {len(labels[split])} | {100 * share:.1f} % |" in text
    stated = re.search(r"gets ([\d.]+) % of validation right", text)
    assert stated and float(stated[1]) == pytest.approx(100 * bag_of_words_accuracy(sentences, labels), abs=0.3)
