"""The project's instruction set as conversations: what the embedded chat model is tuned on, and what it is tested on."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from core.datasets import is_held_out, read_jsonl
from engines.embedded.extracts import extract, sentences
from engines.embedded.phrasings import FOLLOW_UPS, READING, SUMMARY, as_typed, fill, garbled, phrase
from engines.prompting import Message

CORPUS = Path(__file__).resolve().parent.parent.parent / "assets" / "corpus"
HELD_OUT_PERCENT = 12.0
_SHORT_FORMS = (("definition", 3), ("short", 2), ("explanation", 1), ("how", 1), ("why", 1), ("example", 1), ("comparison", 1))
_CODE_WORDS = ["amber", "anchor", "apricot", "arrow", "badger", "bamboo", "banner", "barley", "basket", "beacon", "birch", "bishop", "blanket", "bonfire", "bottle", "bramble", "bridge", "bronze", "bucket", "butter", "cabin", "candle", "canyon", "carbon", "carpet", "cedar", "cellar", "cherry", "chimney", "cinder", "clover", "cobalt", "comet", "copper", "coral", "cotton", "cradle", "crimson", "crystal", "daisy", "dagger", "dolphin", "dragon", "eagle", "ebony", "elder", "emerald", "falcon", "feather", "fennel", "ferry", "fiddle", "finch", "flint", "fossil", "garnet", "ginger", "glacier", "granite", "gravel", "hammer", "harbor", "hazel", "heron", "hollow", "honey", "indigo", "island", "ivory", "jacket", "jasmine", "jigsaw", "juniper", "kettle", "kitten", "ladder", "lagoon", "lantern", "lavender", "lemon", "lichen", "lilac", "linen", "magnet", "mango", "maple", "marble", "meadow", "melon", "mirror", "mosaic", "mustard", "nectar", "needle", "nickel", "nutmeg", "oasis", "ocean", "olive", "onyx", "orchid", "otter", "oyster", "paddle", "panther", "parrot", "pebble", "pepper", "pigeon", "pillow", "plaster", "pocket", "poplar", "prairie", "pumpkin", "puzzle", "quarry", "quartz", "rabbit", "raven", "ribbon", "river", "robin", "rocket", "saddle", "saffron", "salmon", "sapphire", "scarlet", "shadow", "silver", "sparrow", "spindle", "spruce", "stable", "summit", "sunset", "tangent", "temple", "thistle", "thunder", "timber", "topaz", "trumpet", "tulip", "tunnel", "turnip", "turtle", "velvet", "violet", "walnut", "willow", "winter", "yarrow", "zephyr"]

_THINGS = ("dog", "cat", "horse", "boat", "bicycle", "robot", "team", "village", "project", "song", "ship", "street", "band", "school", "printer", "teacher", "neighbour", "planet")


@dataclass(frozen=True)
class Mix:
    """How much of each kind an epoch holds.

    forms: how often each topic is asked for in each form. The short ones teach for few tokens which words of a question name the topic.
    unknowns: times each question outside the topics is asked. follow_ups: second turns a topic. readings: questions a text. written_summaries: times each is shown.
    topic_extracts, recalls: conversations of that kind.
    """

    forms: tuple[tuple[str, int], ...] = _SHORT_FORMS
    unknowns: int = 2
    follow_ups: int = 4
    readings: int = 2
    written_summaries: int = 1
    topic_extracts: int = 200
    recalls: int = 500


@dataclass(frozen=True)
class InstructionSet:
    """Everything written for the chat model; `evaluation` parts are never trained on."""

    topics: list[dict[str, Any]]
    summaries: list[dict[str, Any]]
    reading: list[dict[str, Any]]
    smalltalk: list[dict[str, Any]]
    unknown: list[str]
    declines: list[str]
    evaluation_unknown: list[str]
    evaluation_follow_ups: list[dict[str, Any]]


def load_instructions(folder: Path = CORPUS) -> InstructionSet:
    """Read the instruction set."""
    more = {r["id"]: r["questions"] for path in sorted((folder / "questions").glob("*.jsonl")) for r in read_jsonl(path)}
    topics = [_with_questions(t, more.get(t["id"], {})) for path in sorted((folder / "topics").glob("*.jsonl")) for t in read_jsonl(path)]
    return InstructionSet(
        topics=topics,
        summaries=list(read_jsonl(folder / "summaries.jsonl")),
        reading=list(read_jsonl(folder / "reading.jsonl")),
        smalltalk=list(read_jsonl(folder / "smalltalk.jsonl")),
        unknown=[r["question"] for r in read_jsonl(folder / "unknown.jsonl")],
        declines=[r["answer"] for r in read_jsonl(folder / "declines.jsonl")],
        evaluation_unknown=[r["question"] for r in read_jsonl(folder / "eval" / "unknown.jsonl")],
        evaluation_follow_ups=list(read_jsonl(folder / "eval" / "follow_ups.jsonl")),
    )


def _with_questions(topic: dict[str, Any], more: dict[str, list[str]]) -> dict[str, Any]:
    """A topic with the questions of both files."""
    forms = dict.fromkeys((*topic["questions"], *more))
    return {**topic, "questions": {form: [*topic["questions"].get(form, []), *more.get(form, [])] for form in forms}}


def answer_of(topic: dict[str, Any], form: str) -> str:
    """The written answer of a topic in one form."""
    return str(topic["comparison"]["text"] if form == "comparison" else topic[form])


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def normalised(question: str) -> str:
    """A question without case, punctuation and spacing, to tell whether two are the same."""
    return " ".join(re.findall(r"[a-z0-9]+", question.lower()))


def evaluation_questions(data: InstructionSet) -> set[str]:
    """Every question of the evaluation, normalised: none of them may be trained on."""
    held = {normalised(t["held_out"]["question"]) for t in data.topics} | {normalised(q) for q in data.evaluation_unknown}
    held |= {normalised(turn) for row in data.evaluation_follow_ups for turn in row["turns"]}
    return held | {normalised(q["question"]) for row in data.reading if is_held_out(row["id"], HELD_OUT_PERCENT) for q in row["questions"]}


def _topic_singles(data: InstructionSet, mix: Mix, rng: np.random.Generator) -> Iterator[list[Message]]:
    for topic in data.topics:
        for form, times in mix.forms:
            for _ in range(times):
                yield [_user(phrase(form, topic, rng)), _assistant(answer_of(topic, form))]


def _topic_talks(data: InstructionSet, mix: Mix, rng: np.random.Generator) -> Iterator[list[Message]]:
    for topic in data.topics:
        first = str(rng.choice(["definition", "short", "short", "explanation"]))
        for place in rng.permutation(len(topic["follow_ups"]))[: mix.follow_ups]:
            follow = topic["follow_ups"][place]
            talk = [_user(phrase(first, topic, rng)), _assistant(answer_of(topic, first))]
            if rng.random() < 0.5:
                form = str(rng.choice([f for f in FOLLOW_UPS if f != first]))
                talk += [_user(as_typed(fill(str(rng.choice(FOLLOW_UPS[form])), topic), rng)), _assistant(answer_of(topic, form))]
            yield [*talk, _user(follow["question"]), _assistant(follow["answer"])]


def _summaries(data: InstructionSet, mix: Mix, rng: np.random.Generator) -> Iterator[list[Message]]:
    for row in data.summaries * mix.written_summaries:
        if not is_held_out(row["id"], HELD_OUT_PERCENT):
            yield [_user(summary_prompt(row["text"], str(rng.choice(SUMMARY)))), _assistant(row["summary"])]


def _extracts(data: InstructionSet, mix: Mix, rng: np.random.Generator) -> Iterator[list[Message]]:
    """Parts of the topics' texts, joined anew each time, and the sentences to keep of them."""
    for _ in range(mix.topic_extracts):
        topic = data.topics[int(rng.integers(len(data.topics)))]
        forms = rng.permutation(["definition", "explanation", "how", "why", "example"])
        parts = [s for form in forms[: int(rng.integers(2, 4))] for s in sentences(answer_of(topic, str(form)))]
        first = int(rng.integers(0, max(1, len(parts) - 4)))
        yield extract_talk(" ".join(parts[first : first + int(rng.integers(5, 10))]), rng)


def extract_talk(text: str, rng: np.random.Generator) -> list[Message]:
    """A text to summarise and its most telling sentences."""
    return [_user(summary_prompt(text, str(rng.choice(SUMMARY)))), _assistant(extract(text))]


def summary_prompt(text: str, template: str = SUMMARY[0]) -> str:
    """A text to summarise, as one message."""
    return template.replace("{x}", text)


def _reading(data: InstructionSet, mix: Mix, rng: np.random.Generator) -> Iterator[list[Message]]:
    for row in data.reading:
        if is_held_out(row["id"], HELD_OUT_PERCENT):
            continue
        questions = [row["questions"][i] for i in rng.permutation(len(row["questions"]))]
        for first, second in list(zip(questions, [*questions[1:], questions[0]], strict=True))[: mix.readings]:
            opening = reading_prompt(row["text"], first["question"], str(rng.choice(READING)))
            yield [_user(opening), _assistant(_sentence(first["answer"])), _user(second["question"]), _assistant(_sentence(second["answer"]))]


def reading_prompt(text: str, question: str, template: str = READING[0]) -> str:
    """A question about a text, as one message."""
    return template.replace("{q}", question).replace("{lq}", question[:1].lower() + question[1:]).replace("{x}", text)


def _sentence(answer: str) -> str:
    return answer[:1].upper() + answer[1:].rstrip(".") + "."


def code_word_talk(word: str, fillers: list[str], rng: np.random.Generator) -> list[Message]:
    """A code word, other text, and the question for it; the last message is the answer."""
    ask = str(rng.choice(["What was the code word?", "What is the code word?", "Tell me the code word.", "Which code word did I give you?", "Do you remember the code word?"]))
    told = str(rng.choice([f"Remember the code word: {word}.", f"The code word is {word}.", f"Please remember the code word {word}.", f"My code word is {word}. Keep it in mind."]))
    return _remembered(told, f"I will remember the code word {word}.", fillers, ask, f"The code word is {word}.", rng)


def _remembered(told: str, noted: str, fillers: list[str], ask: str, answer: str, rng: np.random.Generator) -> list[Message]:
    if rng.random() < 0.5:
        return [_user("\n\n".join([told, *fillers, ask])), _assistant(answer)]
    return [_user(told), _assistant(noted), _user("\n\n".join([*fillers, ask])), _assistant(answer)]


def _fact_talk(word: str, fillers: list[str], rng: np.random.Generator) -> list[Message]:
    """Some other small thing to be remembered."""
    thing, owner = (str(rng.choice(words)) for words in (_THINGS, ("my", "our", "the")))
    yours = {"my": "your", "our": "your", "the": "the"}[owner]
    told = str(rng.choice([f"{owner.capitalize()} {thing} is called {word}.", f"The name of {owner} {thing} is {word}."]))
    ask = str(rng.choice([f"What is {owner} {thing} called?", f"What is the name of {owner} {thing}?"]))
    return _remembered(told, f"I will remember that {yours} {thing} is called {word}.", fillers, ask, f"{yours.capitalize()} {thing} is called {word}.", rng)


def code_words(held_out: bool) -> list[str]:
    """Code words for training, or those kept apart."""
    return [w for w in _CODE_WORDS if is_held_out(w, HELD_OUT_PERCENT) == held_out]


def _recall(data: InstructionSet, mix: Mix, rng: np.random.Generator) -> Iterator[list[Message]]:
    words = code_words(held_out=False)
    for _ in range(mix.recalls):
        fillers = [answer_of(data.topics[int(rng.integers(len(data.topics)))], str(rng.choice(["definition", "explanation", "why", "example"])))
                   for _ in range(int(rng.choice([0, 0, 1, 1, 2, 3, 5])))]
        word = str(rng.choice(words))
        if rng.random() < 0.5:  # any letters: the word must be copied, not known
            word = "".join(rng.choice(list("bcdfghklmnprstvz")) + rng.choice(list("aeiou")) for _ in range(int(rng.integers(2, 4))))
        yield (_fact_talk if rng.random() < 0.3 else code_word_talk)(word, fillers, rng)


def _smalltalk(data: InstructionSet, mix: Mix, rng: np.random.Generator) -> Iterator[list[Message]]:
    for row in data.smalltalk:
        for question in row["questions"]:
            yield [_user(question), _assistant(row["answer"])]


def _unknown(data: InstructionSet, mix: Mix, rng: np.random.Generator) -> Iterator[list[Message]]:
    for question in data.unknown:
        for _ in range(mix.unknowns):
            yield [_user(as_typed(question, rng)), _assistant(str(rng.choice(data.declines)))]


def garbled_questions(data: InstructionSet, epoch: int, seed: int, per_topic: int) -> list[list[Message]]:
    """Questions with words missing and strange ones in between, `per_topic` a topic and half as many outside the topics, shuffled."""
    rng = np.random.default_rng((seed, epoch, 4))
    kept_apart = evaluation_questions(data)
    forms = ["definition", "definition", "short", "explanation", "explanation", "how", "how", "why", "example"]
    talks = []
    for topic in data.topics:
        for _ in range(per_topic):
            form = str(rng.choice(forms))
            question = garbled(phrase(form, topic, rng), [topic["mention"], topic["term"], *topic["aliases"]], data.unknown, rng)
            talks.append([_user(question), _assistant(answer_of(topic, form))])
    for _ in range(len(data.topics) * per_topic // 2):
        question = garbled(as_typed(str(rng.choice(data.unknown)), rng), (), data.unknown, rng)
        talks.append([_user(question), _assistant(str(rng.choice(data.declines)))])
    talks = [t for t in talks if normalised(t[0]["content"]) not in kept_apart]
    return [talks[i] for i in rng.permutation(len(talks))]


def garbled_seconds(data: InstructionSet, epoch: int, seed: int, per_topic: int) -> list[list[Message]]:
    """Talks whose second question is garbled and never names the topic: `per_topic` a topic, shuffled."""
    rng = np.random.default_rng((seed, epoch, 5))
    kept_apart = evaluation_questions(data)
    talks = []
    for topic in data.topics:
        for _ in range(per_topic):
            first = str(rng.choice(["definition", "definition", "short", "explanation"]))
            opening = phrase(first, topic, rng)
            if rng.random() < 0.5:
                opening = garbled(opening, [topic["mention"], topic["term"], *topic["aliases"]], data.unknown, rng)
            if rng.random() < 0.3:
                follow = topic["follow_ups"][int(rng.integers(len(topic["follow_ups"])))]
                question, answer = follow["question"], follow["answer"]
            else:
                form = str(rng.choice([f for f in FOLLOW_UPS if f != first]))
                question, answer = fill(str(rng.choice(FOLLOW_UPS[form])), topic), answer_of(topic, form)
            if rng.random() < 0.7:
                question = garbled(question, (), data.unknown, rng)
            talks.append([_user(opening), _assistant(answer_of(topic, first)), _user(question), _assistant(answer)])
    talks = [t for t in talks if not any(normalised(t[i]["content"]) in kept_apart for i in (0, 2))]
    return [talks[i] for i in rng.permutation(len(talks))]


def conversations(data: InstructionSet, epoch: int, seed: int = 0, mix: Mix | None = None) -> list[list[Message]]:
    """One epoch of training conversations, shuffled; phrasings differ between epochs, answers do not."""
    rng = np.random.default_rng((seed, epoch))
    kept_apart = evaluation_questions(data)
    talks = [
        talk
        for make in (_topic_singles, _topic_talks, _summaries, _extracts, _reading, _recall, _smalltalk, _unknown)
        for talk in make(data, mix or Mix(), rng)
        if not any(m["role"] == "user" and normalised(m["content"]) in kept_apart for m in talk)
    ]
    return [talks[i] for i in rng.permutation(len(talks))]
