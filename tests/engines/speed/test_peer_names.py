"""Which rivals there are, what is said where one cannot be measured, and whom each is measured against. No rival need be installed."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from cli import main
from core.bundle import Bundle
from core.errors import InvalidRequest, MissingDependency, UnsupportedModel
from engines.speed import decode, prefill
from engines.speed.decode import counterparts, time_decode
from engines.speed.peers import names
from engines.speed.peers.names import COUNTERPARTS, load_peer, peer_methods, require
from engines.speed.peers.peer import LlamaShape
from engines.speed.prefill import time_prefill
from tests.engines.speed.conftest import WORDS


def test_names_stand_for_every_form_of_the_weights_once() -> None:
    assert peer_methods(["llama.cpp", "openvino", "llama.cpp:Q8_0"]) == tuple(COUNTERPARTS)
    assert peer_methods(["llama.cpp:Q4_0"]) == ("llama.cpp:Q4_0",) and peer_methods([]) == ()


@pytest.mark.parametrize("name", ["vllm", "llama.cpp:Q9", "openvino:", ""])
def test_unknown_rival_is_said_with_what_there_is(name: str) -> None:
    with pytest.raises(InvalidRequest, match="there are llama.cpp, openvino, llama.cpp:Q8_0"):
        peer_methods([name])


def test_command_refuses_an_unknown_rival_before_it_measures(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for command in ("decode", "prefill"):
        monkeypatch.setattr(sys, "argv", ["cli.py", "bench", command, "--peers", "llama.cpp", "vllm"])
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 2 and "There is no rival 'vllm'" in capsys.readouterr().err


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("nothing_installed")
def test_missing_packages_are_named_with_the_way_to_install_them() -> None:
    with pytest.raises(MissingDependency, match=r"llama.cpp:Q8_0 is not measured: llama-cpp-python and gguf are not installed. Run pip install -r requirements-peers.txt"):
        require("llama.cpp:Q8_0")
    with pytest.raises(MissingDependency, match="openvino is not installed"):
        require("openvino:int8")


def test_models_that_are_no_plain_llama_are_refused(family_bundle: Any) -> None:
    for family in ("qwen2", "opt", "gpt2"):
        with pytest.raises(UnsupportedModel, match=f"architecture is {family}"):
            LlamaShape.of(family_bundle(family), "openvino")


def test_counterparts_are_found_however_they_are_spelled() -> None:
    offered = ["native", "int8+native", "native+int8:float32", "native+int4:bfloat16", "native+int8+larosa:bfloat16"]
    assert counterparts("llama.cpp:Q8_0", offered) == ["int8+native", "native+int8+larosa:bfloat16"]
    assert counterparts("llama.cpp:BF16", offered) == ["native"]


class SlowPeer:
    """Takes 20 ms a call and counts what it holds."""

    executor = "slow 1"
    weight_bytes, kv_bytes_per_token = 1000, 10

    def __init__(self) -> None:
        self.settings: dict[str, Any] = {}
        self.held = self.most = 0

    def settle(self, ids: Sequence[int], phase: str) -> None:
        self.settings["phase"] = phase

    def prefill(self, ids: Sequence[int]) -> np.ndarray[Any, Any]:
        self.held = 0
        return self._add(len(ids))

    def decode(self, token: int) -> np.ndarray[Any, Any]:
        return self._add(1)

    def crop(self, tokens: int) -> None:
        self.held -= tokens

    def _add(self, tokens: int) -> np.ndarray[Any, Any]:
        time.sleep(0.02)
        self.held += tokens
        self.most = max(self.most, self.held)
        return np.ones(WORDS, dtype=np.float32)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, llama: Bundle) -> None:
    for module in (decode, prefill):
        monkeypatch.setattr(module, "load_shape", lambda name, dtype: llama)
    monkeypatch.setattr(decode, "read_bandwidth", lambda: 1e9)


@pytest.mark.usefixtures("tiny")
def test_rival_is_measured_against_transformers_and_our_counterpart(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[SlowPeer] = []

    def load(method: str, bundle: Bundle, context: int) -> SlowPeer:
        made.append(SlowPeer())
        assert context == 16 + 2 * 2 + 2
        return made[-1]

    monkeypatch.setattr(decode, "load_peer", load)
    out = time_decode("tiny", ("native:bfloat16", "native+int8:bfloat16"), ("llama.cpp:Q8_0", "openvino"), context=16, tokens=2, rounds=1)
    rows = {row["method"]: row for row in out["rows"]}
    assert [row for row in rows if "error" in rows[row]] == []
    for name in ("llama.cpp:Q8_0", "openvino:int8"):
        row = rows[name]
        assert row["executor"] == "slow 1" and row["settings"] == {"phase": "decode"} and row["bytes_per_token"] == 1160
        assert 20 < row["decode_tok_s"] <= 50 and row["steps"] == 8 and row["speedup_vs_baseline"] < 1 and abs(row["logits_cosine"]) < 0.5
    assert set(rows["native+int8:bfloat16"]["speedup_vs_peer"]) == {"llama.cpp:Q8_0", "openvino:int8"}
    assert min(rows["native+int8:bfloat16"]["speedup_vs_peer"].values()) > 2
    assert all("speedup_vs_peer" not in row for name, row in rows.items() if name != "native+int8:bfloat16")
    assert [(peer.held, peer.most) for peer in made] == [(16, 20), (16, 20)]


@pytest.mark.usefixtures("tiny")
def test_prefill_of_a_rival_is_paired_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill, "load_peer", lambda method, bundle, context: SlowPeer())
    rows = {row["method"]: row for row in time_prefill("tiny", ("native+int8:bfloat16",), ("openvino", "llama.cpp:Q4_0"), tokens=16, rounds=1)["rows"]}
    assert set(rows["native+int8:bfloat16"]["speedup_vs_peer"]) == {"openvino:int8"}
    assert rows["openvino:int8"]["settings"] == {"phase": "prefill"} and 400 < rows["llama.cpp:Q4_0"]["prefill_tok_s"] <= 800


@pytest.mark.usefixtures("tiny", "nothing_installed")
def test_rival_that_is_not_installed_is_a_row_that_says_so() -> None:
    for out in (time_decode("tiny", (), ("llama.cpp:Q8_0",), context=16, tokens=1, rounds=1), time_prefill("tiny", (), ("llama.cpp:Q8_0",), tokens=16, rounds=1)):
        assert out["rows"][-1]["method"] == "llama.cpp:Q8_0" and "not installed" in out["rows"][-1]["error"]


def test_every_form_can_be_loaded_by_name(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def refuse(method: str) -> None:
        asked.append(method)
        raise MissingDependency(method)

    monkeypatch.setattr(names, "require", refuse)
    for method in COUNTERPARTS:
        with pytest.raises(MissingDependency):
            load_peer(method, llama, 16)
    assert asked == list(COUNTERPARTS)
