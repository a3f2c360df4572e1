"""The instruction set: as varied, as large and as well kept apart from its evaluation as its card says."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerBase

from core.bundle import Bundle
from core.datasets import Document, TokenStream, is_held_out
from core.loading import load_bundle
from core.losses import IGNORE
from core.progress import Stop
from engines.embedded import chat_tuning
from engines.embedded.chat_tuning import batches, encode_talk
from engines.embedded.extracts import extract, paragraphs, sentences
from engines.embedded.instructions import (
    CORPUS,
    HELD_OUT_PERCENT,
    InstructionSet,
    Mix,
    answer_of,
    code_words,
    conversations,
    evaluation_questions,
    garbled_questions,
    load_instructions,
    normalised,
)
from engines.embedded.short_attention import LONGEST, NAME, use_short_row_attention
from engines.embedded.tokenizer import train_tokenizer
from engines.embedded.windows import corpus_windows, echo
from engines.text_quality import keyword_recall
from tests import families
from tests.tolerances import SUM_ORDER

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


def test_follow_ups_of_the_evaluation_are_answered_by_their_topic_and_refer_back(data: InstructionSet) -> None:
    topics = {t["id"]: t for t in data.topics}
    assert len(data.evaluation_follow_ups) == len({row["topic"] for row in data.evaluation_follow_ups}) == 60
    for row in data.evaluation_follow_ups:
        topic, form = topics[row["topic"]], row["form"]
        right = topic["follow_ups"][int(form.split(":")[1])]["answer"] if form.startswith("follow_up:") else answer_of(topic, form)
        assert keyword_recall(right, row["keywords"]) == 1, row
        first, second = row["turns"]
        names = [topic["term"], topic["mention"], *topic["aliases"]]
        assert any(name.lower() in first.lower() for name in names), row
        assert not re.search(rf"\b{re.escape(topic['term'].lower())}\b", second.lower()), row


def test_code_words_of_the_evaluation_are_not_trained_on() -> None:
    assert len(code_words(held_out=True)) >= 10
    assert not set(code_words(held_out=True)) & set(code_words(held_out=False))


def test_epochs_differ_in_questions_and_agree_in_answers(data: InstructionSet) -> None:
    first, second = conversations(data, 0), conversations(data, 1)
    assert first == conversations(data, 0)
    assert {m["content"] for t in first for m in t if m["role"] == "user"} != {m["content"] for t in second for m in t if m["role"] == "user"}


def test_only_the_assistant_is_learned(data: InstructionSet) -> None:
    tokenizer = train_tokenizer([t["definition"] for t in data.topics[:50]], 400)
    talk = [{"role": "user", "content": "What is rain?"}, {"role": "assistant", "content": "Water that falls."}]
    ids, labels = encode_talk(talk, tokenizer)  # type: ignore[arg-type]
    assert ids == tokenizer.apply_chat_template(talk, return_dict=False)
    assert tokenizer.decode([t for t in labels if t != IGNORE]) == "Water that falls.<|end|>"


def test_batches_hold_every_row_once_from_its_start_and_pad_on_the_right() -> None:
    rng = np.random.default_rng(0)
    rows = [([1000 + place, *range(length)], [IGNORE, *range(length)]) for place, length in enumerate(rng.integers(1, 200, 300).tolist())]
    made = batches(rows, 1024, 9999, np.random.default_rng(1))
    seen = []
    for ids, labels in made:
        assert ids.shape == labels.shape and (len(ids) == 1 or ids.size <= 1024)
        for row, label in zip(ids, labels, strict=True):
            length = int((row != 9999).sum())
            original = rows[int(row[0]) - 1000]
            assert row[:length].tolist() == original[0] and label[:length].tolist() == original[1]
            assert (row[length:] == 9999).all() and (label[length:] == IGNORE).all()
            seen.append(int(row[0]))
    assert sorted(seen) == [1000 + place for place in range(300)]
    padding = sum(int((ids == 9999).sum()) for ids, _ in made) / sum(ids.size for ids, _ in made)
    assert padding < 0.1, "rows of unlike length share a batch"


def test_extracts_are_sentences_of_their_text_in_order_and_shorter_than_half(data: InstructionSet) -> None:
    for row in data.summaries:
        short = extract(row["text"])
        parts = sentences(short)
        places = [row["text"].find(part) for part in parts]
        assert min(places) == 0 and places == sorted(places), row["id"]
        assert len(short.split()) < 0.5 * len(row["text"].split()), row["id"]


def test_extracts_keep_key_terms_better_than_the_first_sentences_do(data: InstructionSet) -> None:
    def first_sentences(text: str) -> str:
        kept: list[str] = []
        for sentence in sentences(text):
            if sum(len(s.split()) for s in [*kept, sentence]) > 0.48 * len(text.split()):
                break
            kept.append(sentence)
        return " ".join(kept)

    ours = np.mean([keyword_recall(extract(r["text"]), r["key_terms"]) for r in data.summaries])
    lead = np.mean([keyword_recall(first_sentences(r["text"]), r["key_terms"]) for r in data.summaries])
    assert ours > 0.55 and ours > lead


def test_paragraphs_are_prose_of_the_asked_length() -> None:
    prose = "The sea is deep and cold in most places. Light does not reach the bottom of it at all. Fish there make light of their own somehow. " * 6
    document = Document(prose + "\n- a list `code` {x}\n" + prose, "s", "science")
    found = list(paragraphs([document], low=40, high=90))
    assert len(found) >= 2
    assert all(40 <= len(p.split()) <= 90 and "`" not in p for p in found)


@pytest.mark.parametrize("seed", range(20))
def test_echo_repeats_a_passage_and_changes_nothing_else(seed: int) -> None:
    window = np.arange(128, dtype=np.int64) + 1000
    out = echo(window, np.random.default_rng(seed))
    assert out.shape == window.shape
    values, counts = np.unique(out, return_counts=True)
    assert set(values) <= set(window) and counts.max() == 2 and (counts == 2).sum() >= 8
    first = {v: int(np.flatnonzero(out == v)[0]) for v in values[counts == 2]}
    second = {v: int(np.flatnonzero(out == v)[1]) for v in values[counts == 2]}
    assert len({second[v] - first[v] for v in first}) == 1, "the second saying is not the first one, moved"


def test_corpus_windows_give_about_the_tokens_asked_for_and_other_ones_each_epoch() -> None:
    stream = TokenStream(np.arange(60_000, dtype=np.uint16))
    first, second = (list(corpus_windows(stream, 12_000, epoch, 0, lengths=(64, 128))) for epoch in (0, 1))
    assert 0.9 < sum(map(len, first)) / 12_000 <= 1
    assert {len(w) for w in first} == {64, 128}
    starts = [{int(w[0]) for w in windows if len(w) == 128} for windows in (first, second)]
    assert not starts[0] & starts[1]


@pytest.mark.parametrize("length", [7, LONGEST, LONGEST + 1])
def test_short_row_attention_is_sdpa(length: int, llama: Bundle) -> None:
    model: Any = llama.model
    heads = model.config.num_attention_heads
    full = families.make_model("llama", llama.tokenizer, num_key_value_heads=heads)
    ids = torch.arange(3 * length).reshape(3, length) % 290
    wanted = full(input_ids=ids, use_cache=False).logits
    use_short_row_attention(full)
    assert full.config._attn_implementation == NAME
    assert SUM_ORDER.holds(full(input_ids=ids, use_cache=False).logits, wanted)


def test_tuning_runs_resumes_and_writes_a_model_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerBase) -> None:
    backbone, corpus = tmp_path / "backbone", tmp_path / "corpus"
    full = families.make_model("llama", tokenizer, num_key_value_heads=4, max_position_embeddings=1024)
    full.save_pretrained(backbone)
    tokenizer.save_pretrained(backbone)
    corpus.mkdir()
    text = "The sea is deep and cold in most places. Light does not reach the bottom of it at all. Fish there make light of their own somehow. " * 12
    (corpus / "science.jsonl").write_text("\n".join(json.dumps({"text": text, "source": f"s{n}"}) for n in range(20)))
    monkeypatch.setattr(chat_tuning, "encode_talk", _only_role_tokens(tokenizer))
    monkeypatch.setattr(chat_tuning, "conversations", lambda data, epoch, seed, mix: [TALK] * 40)
    stages = [chat_tuning.Stage(epochs, Mix(), corpus_tokens=2000, first_corpus_tokens=4000, corpus_extracts=3, batch_tokens=512) for epochs in (1, 2)]
    plan = chat_tuning.ChatPlan(stages=tuple(stages))
    stop = Stop()
    stop.request()
    report = chat_tuning.train_chat(backbone, tmp_path / "out", tmp_path / "work", plan, corpus=corpus, stop=stop)
    assert report.stopped and not (tmp_path / "out").exists()
    report = chat_tuning.train_chat(backbone, tmp_path / "out", tmp_path / "work", plan, corpus=corpus)
    assert (tmp_path / "work" / "stage1" / "model.safetensors").is_file()
    losses = [value for _, value in report.losses]
    assert report.stopped is None and np.mean(losses[-5:]) < np.mean(losses[:5])
    loaded = load_bundle(str(tmp_path / "out"))
    assert loaded.model.config._attn_implementation == "sdpa"
    assert not torch.equal(loaded.model.get_parameter("model.norm.weight"), full.get_parameter("model.norm.weight").bfloat16())


def test_an_answers_opening_counts_more_than_its_rest() -> None:
    learned = torch.zeros(2, 30, dtype=torch.bool)
    learned[0, 5:25] = True
    learned[1, :3] = learned[1, 10:12] = True
    counts = torch.bincount(chat_tuning.emphasised(learned), minlength=60).reshape(2, 30)
    weight, opening = chat_tuning.OPENING_WEIGHT, chat_tuning.OPENING_TOKENS
    assert counts[0].tolist() == [0] * 5 + [weight] * opening + [1] * (20 - opening) + [0] * 5
    assert counts[1].tolist() == [weight] * 3 + [0] * 7 + [weight] * 2 + [0] * 18


def test_garbled_questions_keep_their_topics_name_and_are_no_evaluation_question(data: InstructionSet) -> None:
    talks = garbled_questions(data, 0, 0, 2)
    kept_apart = evaluation_questions(data)
    declines = set(data.declines)
    names = {answer_of(t, form): [t["term"], t["mention"], *t["aliases"]] for t in data.topics for form in FORMS}
    inside = [t for t in talks if t[1]["content"] not in declines]
    assert len(inside) == 2 * len(data.topics) and len(talks) - len(inside) == len(data.topics)
    named = [any(n.lower() in t[0]["content"].lower() for n in names[t[1]["content"]]) for t in inside]
    assert np.mean(named) > 0.97  # written questions may name the topic in a way of their own
    assert not any(normalised(t[0]["content"]) in kept_apart for t in talks)
    plain = {m["content"] for talk in conversations(data, 0) for m in talk}
    assert np.mean([t[0]["content"] in plain for t in inside]) < 0.1, "questions are not garbled"


def test_only_the_opening_of_a_garbled_questions_answer_is_learned() -> None:
    row = (list(range(40)), [IGNORE] * 10 + list(range(10, 40)))
    ids, labels = chat_tuning.opening_only(row)
    assert ids == list(range(10 + chat_tuning.OPENING_ROWS)) and labels == row[1][: len(ids)]


@pytest.mark.parametrize("mix", [Mix(), Mix(follow_ups=1, readings=0, written_summaries=2, topic_extracts=7, recalls=0)])
def test_a_mix_holds_as_many_conversations_as_it_says(mix: Mix, data: InstructionSet) -> None:
    talks = conversations(data, 0, 0, mix)
    texts = {s["text"] for s in data.summaries}
    summaries = [t for t in talks if any(text in t[0]["content"] for text in texts)]
    kept = sum(not is_held_out(s["id"], HELD_OUT_PERCENT) for s in data.summaries)
    assert len(summaries) == kept * mix.written_summaries
    assert sum("code word" in t[-1]["content"] or " is called " in t[-1]["content"] for t in talks) >= 0.9 * mix.recalls
    follow_ups = {f["answer"] for t in data.topics for f in t["follow_ups"]}
    assert sum(t[-1]["content"] in follow_ups for t in talks) == len(data.topics) * mix.follow_ups


TALK = [{"role": "user", "content": "What is rain?"}, {"role": "assistant", "content": "Water that falls."}]


def _only_role_tokens(tokenizer: PreTrainedTokenizerBase) -> Any:
    def encode(talk: Any, _: Any) -> Any:
        ids = [t for m in talk for t in tokenizer(m["content"])["input_ids"]]
        return ids, [IGNORE, *ids[1:]]

    return encode
