"""The instruction set: as varied, as large and as well kept apart from its evaluation as its card says."""

from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from core.datasets import is_held_out
from engines.embedded.chat_tuning import encode_talk, pack
from engines.embedded.instructions import (
    CORPUS,
    HELD_OUT_PERCENT,
    InstructionSet,
    answer_of,
    code_words,
    conversations,
    evaluation_questions,
    load_instructions,
    normalised,
)
from engines.embedded.tokenizer import train_tokenizer

FORMS = ("short", "definition", "explanation", "how", "why", "example", "comparison")


@pytest.fixture(scope="module")
def data() -> InstructionSet:
    return load_instructions()


def answers(data: InstructionSet) -> list[tuple[str, str]]:
    written = [(t["id"], answer_of(t, form)) for t in data.topics for form in FORMS]
    return written + [(t["id"], f["answer"]) for t in data.topics for f in t["follow_ups"]]


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def test_is_as_large_as_promised(data: InstructionSet) -> None:
    assert len(data.topics) >= 400
    assert len({t["id"] for t in data.topics}) == len(data.topics)
    assert len({t["term"].lower() for t in data.topics}) == len(data.topics)
    assert sum(len(text) for _, text in answers(data)) > 1_000_000
    assert sum(path.stat().st_size for path in CORPUS.rglob("*.jsonl")) > 1_500_000
    assert len(data.summaries) >= 150
    assert len(data.evaluation_unknown) >= 60


def test_answers_repeat_few_word_8_grams(data: InstructionSet) -> None:
    grams: Counter[tuple[str, ...]] = Counter()
    for _, text in answers(data):
        row = words(text)
        grams.update(tuple(row[i : i + 8]) for i in range(len(row) - 7))
    assert len(grams) / sum(grams.values()) >= 0.85


def test_no_sentence_opening_is_used_in_more_than_a_few_topics(data: InstructionSet) -> None:
    """A frame is a sentence's first six words with the topic's own term left open."""
    frames: dict[str, set[str]] = defaultdict(set)
    terms = {t["id"]: set(words(f"{t['term']} {t['mention']}")) for t in data.topics}
    for topic, text in answers(data):
        for sentence in re.split(r"(?<=[.!?])\s+", text):
            row = ["_" if w in terms[topic] else w for w in words(sentence)]
            if len(row) >= 8:
                frames[" ".join(row[:6])].add(topic)
    repeated = {frame: topics for frame, topics in frames.items() if len(topics) > 3}
    assert not repeated, repeated


def test_summaries_are_shorter_than_half_and_keep_their_key_terms(data: InstructionSet) -> None:
    for row in data.summaries:
        assert len(row["summary"].split()) < 0.5 * len(row["text"].split()), row["id"]
        assert all(k.lower() in row["summary"].lower() for k in row["key_terms"]), row["id"]


def test_reading_answers_are_spans_of_their_text(data: InstructionSet) -> None:
    for row in data.reading:
        assert all(q["answer"] in row["text"] for q in row["questions"]), row["id"]


@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_no_evaluation_question_is_trained_on(data: InstructionSet, epoch: int) -> None:
    kept_apart = evaluation_questions(data)
    assert len(kept_apart) > 500
    held_texts = [r["text"] for r in [*data.summaries, *data.reading] if is_held_out(r["id"], HELD_OUT_PERCENT)]
    assert len(held_texts) > 20
    for talk in conversations(data, epoch):
        for message in talk:
            if message["role"] == "user":
                assert normalised(message["content"]) not in kept_apart
                assert not any(text in message["content"] for text in held_texts)


def test_code_words_of_the_evaluation_are_not_trained_on() -> None:
    assert len(code_words(held_out=True)) >= 10
    assert not set(code_words(held_out=True)) & set(code_words(held_out=False))


def test_epochs_differ_in_questions_and_agree_in_answers(data: InstructionSet) -> None:
    first, second = conversations(data, 0), conversations(data, 1)
    assert first == conversations(data, 0)
    assert {m["content"] for t in first for m in t if m["role"] == "user"} != {m["content"] for t in second for m in t if m["role"] == "user"}


def test_only_the_assistant_is_learned_and_rows_hold_whole_conversations(data: InstructionSet) -> None:
    tokenizer = train_tokenizer([t["definition"] for t in data.topics[:50]], 400)
    talk = [{"role": "user", "content": "What is rain?"}, {"role": "assistant", "content": "Water that falls."}]
    ids, labels = encode_talk(talk, tokenizer)  # type: ignore[arg-type]
    assert ids == tokenizer.apply_chat_template(talk, return_dict=False)
    learned = tokenizer.decode([t for t in labels if t != -100])
    assert learned == "Water that falls.<|end|>"
    rows, row_labels = pack([(ids, labels)] * 5, 64, tokenizer.pad_token_id)
    assert sum((row == tokenizer.bos_token_id).sum() for row in rows) == 5
    assert (row_labels[rows == tokenizer.pad_token_id] == -100).all()
