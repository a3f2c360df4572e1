"""Tiny Llamas with enough words for the bench's random prompt."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from core.bundle import Bundle, ModelInfo
from tests.families import make_model

WORDS = 8192


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def llama(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> Bundle:
    """Grouped heads, a rotary base of its own, with the head tied to the embedding or not."""
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    return Bundle(make_model("llama", tokenizer, vocab_size=WORDS, tie_word_embeddings=request.param, rope_parameters=rope), tokenizer, ModelInfo("tiny", None, "float32", "local"))
