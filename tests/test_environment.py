"""The fixtures do what the tests rely on: no network, the same seeds, loud skips, models of their own."""

from __future__ import annotations

import os
import random
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import OfflineModeIsEnabled
from transformers import PreTrainedTokenizerBase

from core.bundle import Bundle
from tests import conftest, contract, families


@pytest.mark.parametrize("reach", [
    lambda: socket.create_connection(("huggingface.co", 443), timeout=1),
    lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
    lambda: socket.getaddrinfo("example.org", 80),
    lambda: urllib.request.urlopen("http://192.0.2.1/", timeout=1),
], ids=["name", "address", "look-up", "urllib"])
def test_network_is_impossible(reach: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    with pytest.raises(conftest.NetworkInTest):
        reach()


def test_this_machine_can_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), timeout=5):
        server.accept()[0].close()


def test_hub_client_is_offline() -> None:
    with pytest.raises(OfflineModeIsEnabled):
        huggingface_hub.HfApi().model_info("owner/name")


DRAWN: list[tuple[float, float, float]] = []


@pytest.mark.parametrize("time", ["first", "second"])
def test_every_test_starts_from_the_same_seeds(time: str) -> None:
    DRAWN.append((float(torch.rand(())), random.random(), float(np.random.rand())))
    assert DRAWN[-1] == DRAWN[0]


def test_missing_shared_data_skips_loudly(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(conftest, "SHARED", tmp_path)
    with pytest.raises(pytest.skip.Exception, match=r"NOT RUN: .*stories260K is missing"):
        conftest.shared_path("models", "stories260K")


def test_tokenizer_gives_back_every_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(tokenizer) == conftest.VOCABULARY
    for text in ("Hello  world\n\t ünï 日本 🙂", " lead", contract.PROMPT, "0123"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("family", families.NAMES)
def test_tiny_models_are_the_same_each_time_and_small(family: str, tokenizer: PreTrainedTokenizerBase) -> None:
    one, two = families.make_model(family, tokenizer), families.make_model(family, tokenizer)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert sum(p.numel() for p in one.parameters()) < 200_000 and not one.training


def test_bundles_of_two_calls_share_no_tensor(family_bundle: Callable[[str], Bundle]) -> None:
    one, two = family_bundle("llama"), family_bundle("llama")
    logits = contract.logits_of(two)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter.zero_()
    assert torch.equal(contract.logits_of(two), logits) and logits.std() > 0.1
