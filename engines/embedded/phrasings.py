"""Question phrasings for topics. Answers are written by people; only the ways of asking are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

# {m}: the term as it stands in a sentence, {t}: the bare term, {T}: capitalised, {w}: what it is compared with,
# {is}/{does}/{works}: agree in number.
TEMPLATES: dict[str, tuple[str, ...]] = {
    "definition": (
        "What {is} {m}?", "What {is} {m}?", "What exactly {is} {m}?", "Define {t}.", "Can you define {t}?", "What does {t} mean?",
        "What do people mean by {t}?", "Tell me what {m} {is}.", "Give me a definition of {t}.", "I keep hearing about {t}. What is that?",
        "Do you know what {m} {is}?", "Could you tell me what {m} {is}?", "{T}?", "{T}, what is that?", "meaning of {t}",
        "Somebody mentioned {t}. What did they mean?", "What is meant by the term {t}?", "I need a definition of {t}", "So what {is} {m}?",
        "What would you call {m}?", "What kind of thing {is} {m}?", "What is the meaning of {t}?", "How would you define {t}?",
    ),
    "explanation": (
        "Explain {m}.", "Explain {m} in simple terms.", "Explain {m} to me like I am new to it.", "Can you explain {m}?", "Describe {m} for a beginner.",
        "Tell me about {m}.", "Help me understand {m}.", "I do not understand {m}. Can you help?", "Give me an overview of {m}.", "Teach me about {m}.",
        "What should I know about {m}?", "Explain the idea of {t}.", "explain {t} simply", "Could you introduce me to {m}?", "Please describe {m}.",
        "Explain {m} to a child.", "I want to learn about {m}.", "Tell me more about {m}.", "What can you tell me about {m}?",
        "Give me a simple explanation of {m}.", "Can you describe {m} in plain words?", "Talk to me about {t}.", "I am curious about {m}.",
    ),
    "how": (
        "How {does} {m} work?", "How {does} {m} work?", "Explain how {m} {works}.", "Describe how {m} {works} step by step.", "What happens in {m}?",
        "What is the mechanism behind {m}?", "How {does} {m} come about?", "Can you tell me how {m} {works}?", "In what way {does} {m} work?",
        "how {does} {t} work", "What goes on inside {m}?", "Walk me through how {m} {works}.", "What are the steps in {m}?", "How is {t} done?",
        "What makes {m} work?", "I wonder how {m} {works}.", "Show me how {m} {works}.", "What is the process behind {m}?",
    ),
    "why": (
        "Why {is} {m} important?", "Why {does} {m} matter?", "What {is} {m} used for?", "What {is} {m} good for?", "Why should I care about {m}?",
        "What is the use of {m}?", "Why do people need {m}?", "What is the point of {m}?", "What are the benefits of {m}?",
    ),
    "example": (
        "Give me an example of {m}.", "What is an example of {m}?", "Show me {m} in practice.", "Can you give a concrete example of {m}?",
        "Where do I meet {m} in real life?", "I need an example of {t}.", "Give a real example of {m}.",
    ),
    "comparison": (
        "What is the difference between {m} and {w}?", "How {does} {m} differ from {w}?", "Compare {m} and {w}.", "Compare {m} with {w}.",
        "{T} or {w}: what is the difference?", "How are {m} and {w} different?", "Is there a difference between {m} and {w}?",
    ),
    "short": (
        "In one sentence, what {is} {m}?", "Define {t} in one sentence.", "Briefly, what {is} {m}?", "Give me a short answer: what {is} {m}?",
        "Short definition of {t}, please.", "Explain {m} in one sentence.", "Sum up {m} in one sentence.", "{T} in a nutshell?",
    ),
}

FOLLOW_UPS: dict[str, tuple[str, ...]] = {
    "example": ("Can you give an example?", "Give me an example of that.", "For example?", "Do you have an example?"),
    "why": ("Why does it matter?", "Why is that important?", "What is it good for?", "And why should I care?"),
    "how": ("How does it work?", "And how does that work?", "How exactly?", "Can you say how it works?"),
    "explanation": ("Tell me more.", "Can you explain that more simply?", "Can you explain it in more detail?", "I did not get it. Explain it again."),
    "short": ("Can you say that in one sentence?", "Shorter, please.", "In one sentence?"),
    "comparison": ("How is it different from {w}?", "What is the difference to {w}?", "How does it compare with {w}?"),
}

SUMMARY = (
    "Summarise this text: {x}", "Summarize this: {x}", "Summarize the following text.\n\n{x}", "Please summarise the following text.\n\n{x}",
    "{x}\n\nSummarise the text above.", "{x}\n\nGive me a short summary.", "Give a short summary of this text: {x}", "Can you sum this up? {x}",
    "Write a summary of the text below.\n\n{x}", "tl;dr of this please: {x}", "Shorten this text: {x}", "Summarize the following text in two sentences: {x}",
)
READING = (
    "{x}\n\n{q}", "Read this text: {x}\n\n{q}", "{x}\n\nIn the text above, {lq}", "Text: {x}\n\nQuestion: {q}", "Here is a text. {x}\n\nAnswer from the text: {q}",
    "{x}\n\nAccording to the text, {lq}",
)
_OPENINGS = (
    "Please tell me: ", "Hey, ", "Hi! ", "Hello, ", "Quick question: ", "I have a question. ", "OK, ", "Can you help me? ", "My daughter asked me at dinner: ",
    "My teacher brought this up today. ", "I read something in the paper this morning. ", "A friend and I were arguing. ", "I am preparing for an exam. ",
    "While I was walking home I wondered: ", "My boss used the word in a meeting. ", "There was a film about this last night. ", "For a school project: ",
    "I should know this: ", "Somebody on the radio said it. ", "Just between us, ", "Before we go on, ", "I saw it on a poster. ", "Sorry if this is basic: ",
    "My grandfather wants to know: ", "It came up in a quiz. ", "At work they keep saying it. ", "I am writing an article. ", "On a museum tour I heard about it. ",
)
_ENDINGS = (
    " Thanks!", " Please.", " I am a beginner.", " I have an exam tomorrow.", " Be brief.", " My colleagues never explain it.", " It keeps coming up.", " In your own words, please.",
    " I never got it at school.", " My children want to know.", " No jargon, please.",
)


def fill(template: str, topic: dict[str, Any], term: str | None = None) -> str:
    """A template with a topic's words; an alias as `term` stands for both term and mention."""
    bare, mention = term or topic["term"], term or topic["mention"]
    plural = topic["plural"] and term is None
    words = {
        "{m}": mention, "{t}": bare, "{T}": bare[:1].upper() + bare[1:], "{w}": topic["comparison"]["with"],
        "{is}": "are" if plural else "is", "{does}": "do" if plural else "does", "{works}": "work" if plural else "works",
    }
    for mark, word in words.items():
        template = template.replace(mark, word)
    return template


def as_typed(question: str, rng: np.random.Generator) -> str:
    """A question as people type it: some with an opening, some in lower case, some without the mark at the end."""
    if rng.random() < 0.4:
        opening = str(rng.choice(_OPENINGS))
        question = opening + (question[:1].lower() + question[1:] if opening[-2] in ",:" and question[1:2].islower() else question)
    if rng.random() < 0.15 and question[-1] in "?.!":
        question += str(rng.choice(_ENDINGS))
    if rng.random() < 0.15:
        question = question.lower()
    if rng.random() < 0.15 and question[-1] in "?.!":
        question = question[:-1]
    return question


def garbled(question: str, names: Sequence[str], strangers: Sequence[str], rng: np.random.Generator) -> str:
    """A question with words left out, pieces of other questions put in, and sometimes its pieces in another order; the topic's name stays whole.

    What is learned from such questions is to look for the name, whatever stands around it.

    Args:
        names: ways to write the topic's name; the first that occurs is kept.
        strangers: questions about other things, to take pieces from.
    """
    place, name = next(((i, question[i : i + len(n)]) for n in names if (i := question.lower().find(n.lower())) >= 0), (0, ""))
    pieces = [[w for w in part.split() if rng.random() > 0.25] for part in (question[:place], question[place + len(name) :])]
    if rng.random() < 0.2:
        pieces.reverse()
    for _ in range(int(rng.integers(0, 3))):
        words = str(rng.choice(strangers)).strip("?.! ").split()
        first = int(rng.integers(len(words)))
        side = pieces[int(rng.integers(2))]
        at = int(rng.integers(len(side) + 1))
        side[at:at] = words[first : first + int(rng.integers(1, 7))]
    return " ".join([*pieces[0], *([name] if name else []), *pieces[1]]) or question


def phrase(form: str, topic: dict[str, Any], rng: np.random.Generator) -> str:
    """One way to ask for `form` of a topic: a written phrasing in two of five cases, else a template."""
    written = topic["questions"].get(form, [])
    if written and rng.random() < 0.4:
        return as_typed(str(rng.choice(written)), rng)
    template = str(rng.choice(TEMPLATES[form]))
    usable_alias = topic["aliases"] and form in ("definition", "short") and rng.random() < 0.15
    return as_typed(fill(template, topic, str(rng.choice(topic["aliases"])) if usable_alias else None), rng)
