"""The model that ships with the app still does what its card says, on a few questions of each kind. The card has the whole measurement."""

from __future__ import annotations

import numpy as np
import pytest

from core.loading import load_bundle
from engines.compare.queries import built_in_queries
from engines.embedded.chat_evaluation import ChatEvaluation, is_decline
from engines.embedded.instructions import code_word_talk, code_words
from engines.engine import baseline_engine
from engines.text_quality import keyword_recall


@pytest.fixture(scope="module")
def evaluation() -> ChatEvaluation:
    return ChatEvaluation(baseline_engine(load_bundle("embedded")))


def test_answers_the_built_in_definition(evaluation: ChatEvaluation) -> None:
    assert keyword_recall(evaluation.ask(built_in_queries()[0].question, tokens=60), built_in_queries()[0].keywords) >= 0.6


def test_declines_what_it_does_not_know(evaluation: ChatEvaluation) -> None:
    questions = evaluation.data.evaluation_unknown[::18]
    assert np.mean([is_decline(evaluation.ask(q, tokens=24)) for q in questions]) >= 0.6


def test_recalls_a_code_word_it_was_not_trained_on(evaluation: ChatEvaluation) -> None:
    rng = np.random.default_rng(3)
    hits = []
    for word in code_words(held_out=True)[:6]:
        talk = code_word_talk(word, [evaluation.data.topics[int(rng.integers(400))]["definition"]], rng)
        hits.append(word in evaluation.ask(talk[-2]["content"], history=talk[:-2], tokens=16).lower())
    assert np.mean(hits) >= 0.5
