"""Streamed pieces join to what the tokenizer decodes at once, whatever the script and the tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from engines.text_stream import TextStream

SCRIPTS = (
    "abc XYZ 019 .,!?'\"-_\n\t",
    "äöüßéèñçøåłžÆ",
    "αβγδεζηθ",
    "абвгдежзийк",
    "אבגדהוזח",
    "ابتثجحخد",
    "कखगघनमस्ते",
    "ไทยภาษา",
    "中文字符漢語人工智能",
    "日本語かなカナーティ",
    "한국어말글",
    "𠜎𠜱𠝹𠱓𝒳𝓐",
    "😀😃🎉👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪",
    "\u200b\u200d\ufe0f\u0301",
)
PIECES = st.one_of(*(st.text(alphabet=script, min_size=1, max_size=12) for script in SCRIPTS), st.text(max_size=6))
TEXTS = st.lists(PIECES, min_size=1, max_size=6).map("".join)
FOLDERS = {"gpt2": "byte-level", "opt": "byte-level", "llama2": "sentencepiece", "stories260K": "sentencepiece"}


@pytest.fixture(scope="module")
def tokenizers(shared_folder: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, PreTrainedTokenizerBase]:
    """The tiny chat tokenizer, and those of `shared` that are on this machine."""
    found = {"tiny": tokenizer}
    for name in FOLDERS:
        for folder in (shared_folder / "data" / "tokenizers" / name, shared_folder / "models" / name):
            if (folder / "tokenizer.json").is_file():
                found[name] = AutoTokenizer.from_pretrained(folder)
    return found


@pytest.fixture(scope="module", params=["tiny", *FOLDERS])
def tok(request: pytest.FixtureRequest, tokenizers: dict[str, PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    if request.param not in tokenizers:
        pytest.skip(f"MISSING: the {FOLDERS[request.param]} tokenizer {request.param} is not on this machine")
    return tokenizers[request.param]


def pieces_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.flush()]


def whole(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(text=TEXTS)
@example(text="😀😀😀😀😀")
@example(text="中文字符 𠜎𠜱𠝹𠱓 ok")
@example(text="  two leading blanks")
@example(text="ーティーティーティーティーティー")
def test_pieces_join_to_the_decoded_text(tok: PreTrainedTokenizerBase, text: str) -> None:
    text = text.replace("\ufffd", "")  # several of them cannot be told from broken bytes
    ids = tok(text, add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(tok, ids)) == whole(tok, ids)


def test_replacement_character_that_was_written_is_shown(tok: PreTrainedTokenizerBase) -> None:
    ids = tok("a \ufffd b\ufffd", add_special_tokens=False)["input_ids"]
    assert "".join(pieces_of(tok, ids)) == whole(tok, ids)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_pieces_of_any_byte_level_ids_join_to_the_decoded_text(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    """A model may write anything: broken characters and special tokens in the middle too."""
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=40))
    assert "".join(pieces_of(tokenizer, ids)) == whole(tokenizer, ids)


def test_every_word_comes_with_its_own_token(tok: PreTrainedTokenizerBase) -> None:
    """Finished text is not held back: after each token the pieces so far are the decoded text so far."""
    ids = tok("The little girl saw a big red ball in the park, and she was happy.", add_special_tokens=False)["input_ids"]
    stream, text = TextStream(tok), ""
    for place, token in enumerate(ids, 1):
        text += stream.push(token)
        assert text == whole(tok, ids[:place])
    assert stream.flush() == ""


@pytest.mark.parametrize("character", ["😀", "𠜎"])
def test_unfinished_character_is_held_back(tok: PreTrainedTokenizerBase, character: str) -> None:
    ids = tok("a" + character, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tok, ids)
    assert len(ids) >= 3
    assert "\ufffd" not in "".join(pieces)
    assert [p for p in pieces if character in p] == [character]
    assert pieces[ids.index(ids[-1])] == character  # with its last byte, not at the flush


def test_flush_gives_what_was_held_back(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tokenizer("ok😀", add_special_tokens=False)["input_ids"][:-1]
    pieces = pieces_of(tokenizer, ids)
    assert "".join(pieces[:-1]) == "ok"
    assert pieces[-1] == whole(tokenizer, ids)[2:] != ""


def test_flush_again_gives_nothing_more(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer)
    for token in tokenizer("ok😀", add_special_tokens=False)["input_ids"][:-1]:
        stream.push(token)
    assert stream.flush() != ""
    assert stream.flush() == ""


def test_broken_bytes_do_not_hold_the_stream_for_ever(tokenizer: PreTrainedTokenizerBase) -> None:
    """A model that writes stray bytes is shown writing, in time."""
    stray = tokenizer("😀", add_special_tokens=False)["input_ids"][0]
    stream = TextStream(tokenizer)
    assert any(stream.push(stray) for _ in range(20))


def test_special_tokens_give_no_text(tok: PreTrainedTokenizerBase) -> None:
    special = tok.all_special_ids[0]
    word = tok(" park ball", add_special_tokens=False)["input_ids"]
    ids = [special, *word, special, *word, *[special] * 9, *word]
    assert "".join(pieces_of(tok, ids)) == whole(tok, ids)


def test_empty_answer_has_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert pieces_of(tokenizer, []) == [""]
