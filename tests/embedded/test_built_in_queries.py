"""The five built-in queries: long enough, kept out of training, with keywords that their own texts or topics hold."""

from __future__ import annotations

from engines.compare.queries import built_in_queries
from engines.embedded.about import about_embedded_chat
from engines.embedded.extracts import sentences
from engines.embedded.instructions import answer_of, conversations, load_instructions
from engines.text_quality import keyword_recall

BUILT_IN = built_in_queries()
AI_TEXT, CLIMATE_TEXT = (q.question.removeprefix("Summarise this text: ") for q in BUILT_IN[3:])


def test_there_is_one_of_each_kind_and_two_texts_of_150_words() -> None:
    assert [q.kind for q in BUILT_IN] == ["definition", "explanation", "how it works", "summary", "summary"]
    assert all(140 <= len(text.split()) <= 160 for text in (AI_TEXT, CLIMATE_TEXT))


def test_texts_to_summarise_are_not_trained_on() -> None:
    trained = " ".join(m["content"] for talk in conversations(load_instructions(), 0) for m in talk)
    for text in (AI_TEXT, CLIMATE_TEXT):
        assert not any(sentence in trained for sentence in sentences(text))


def test_keywords_are_what_a_good_answer_holds() -> None:
    topics = {t["id"]: t for t in load_instructions().topics}
    answers = {
        0: answer_of(topics["artificial-intelligence"], "definition") + answer_of(topics["artificial-intelligence"], "explanation"),
        1: answer_of(topics["quantum-mechanics"], "explanation") + answer_of(topics["quantum-mechanics"], "definition"),
        2: answer_of(topics["machine-learning"], "how") + answer_of(topics["machine-learning"], "explanation"),
        3: AI_TEXT, 4: CLIMATE_TEXT,
    }
    for place, answer in answers.items():
        assert keyword_recall(answer, BUILT_IN[place].keywords) >= 0.6, BUILT_IN[place].kind
        assert keyword_recall("Nothing of the kind.", BUILT_IN[place].keywords) == 0


def test_the_line_about_the_model_counts_its_topics() -> None:
    line = about_embedded_chat()
    assert f" {len(load_instructions().topics)} topics" in line and "12.8 million parameters" in line
