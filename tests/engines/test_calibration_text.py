"""The user's calibration text on its way from a request to a technique."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engines.chat import ChatRequest, ChatService, collect
from engines.export import calibration_record, chat_record
from engines.methods import parse_method
from engines.pool import EnginePool
from engines.sampling import Sampling
from ui.chat_handlers import ChatSettings, equal_command

TEXT = " ".join(f"Shop number {n} sells {n + 3} apples and {2 * n} pears to people from street {n % 7}." for n in range(400))
METHOD = "larosa:calibration_tokens=1024"


@pytest.fixture
def model(family_checkpoint: Callable[[str], Path]) -> str:
    return str(family_checkpoint("llama"))


def test_engines_of_other_texts_are_other_engines(model: str) -> None:
    pool = EnginePool()
    own = pool.get(model, parse_method(METHOD), dtype="float32")
    other = pool.get(model, parse_method(METHOD), dtype="float32", calibration=TEXT)
    assert own is not other
    assert pool.get(model, parse_method(METHOD), dtype="float32", calibration=TEXT) is other
    weights = [e.bundle.model.get_parameter("model.layers.0.self_attn.q_proj.weight") for e in (own, other)]
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)


def test_techniques_that_do_not_calibrate_share_one_engine(model: str) -> None:
    pool = EnginePool()
    assert pool.get(model, parse_method("word_removal"), dtype="float32") is pool.get(model, parse_method("word_removal"), dtype="float32", calibration=TEXT)
    assert pool.get(model, dtype="float32") is pool.get(model, dtype="float32", calibration=TEXT)


def test_short_text_fails_its_column_in_words_and_no_other(model: str) -> None:
    request = ChatRequest("hello", ("baseline", "larosa"), model_id=model, dtype="float32", sampling=Sampling(3), calibration="Too short a text.")
    answers, errors = collect(ChatService(EnginePool()).stream(request))
    assert set(answers) == {"baseline"}
    assert "The calibration text has" in errors["larosa"] and "calibration_tokens" in errors["larosa"]


def test_record_holds_size_and_digest_and_not_the_text(model: str) -> None:
    request = ChatRequest("hello", ("baseline",), model_id=model, calibration=TEXT)
    record = chat_record(request, {}, {}, None)
    assert record["request"]["calibration"] == calibration_record(TEXT)
    assert record["request"]["calibration"]["bytes"] == len(TEXT) and "Shop" not in str(record["request"]["calibration"])
    assert calibration_record("") is None


def test_equal_command_names_a_calibration_file() -> None:
    settings = ChatSettings("embedded", "larosa", "", "auto", False, True, {}, calibration=TEXT)
    assert "--calibration calibration.txt" in equal_command("hello", settings)
    assert "--calibration" not in equal_command("hello", ChatSettings("embedded", "larosa", "", "auto", False, True, {}))
