"""Stop while a prompt is read: it acts between layers, and leaves cache and model as they were."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from core.bundle import Bundle
from core.decoding import decode_one_token, prefill
from core.progress import Stop
from optim.vattention.technique import VAttention
from tests.contract import PROMPT

FAMILIES = ("llama", "mistral", "gpt2", "opt", "gpt_neox")


def prompt_ids(bundle: Bundle) -> list[int]:
    return [int(i) for i in bundle.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]][:30]


def blocks_of(bundle: Bundle) -> nn.ModuleList:
    return next(m for m in bundle.model.modules() if isinstance(m, nn.ModuleList))


def hooks_of(bundle: Bundle) -> list[Any]:
    return [hook for m in bundle.model.modules() for hook in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]


def stop_in_block(bundle: Bundle, index: int, stop: Stop, monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks_of(bundle)[index]
    forward = block.forward

    def stopping(*args: Any, **kwargs: Any) -> Any:
        stop.request()
        return forward(*args, **kwargs)

    monkeypatch.setattr(block, "forward", stopping)


@pytest.mark.parametrize("reserved", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_stop_in_a_layer_leaves_the_cache_as_it_was(family: str, reserved: bool, family_bundle: Callable[[str], Bundle], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = family_bundle(family)
    if reserved:
        VAttention().apply(bundle, VAttention().prepare(bundle))
    ids, cache, whole = prompt_ids(bundle), bundle.cache_factory(), bundle.cache_factory()
    for used in (cache, whole):
        assert prefill(bundle, ids[:12], used, Stop()) is not None
    before, hooks, stop = [layer.get_seq_length() for layer in cache.layers], hooks_of(bundle), Stop()
    with monkeypatch.context() as patch:
        stop_in_block(bundle, 0, stop, patch)
        assert prefill(bundle, ids[12:], cache, stop) is None
    assert [layer.get_seq_length() for layer in cache.layers] == before
    assert hooks_of(bundle) == hooks
    after, wanted = prefill(bundle, ids[12:], cache, Stop()), prefill(bundle, ids[12:], whole, Stop())
    assert after is not None and wanted is not None and torch.equal(after, wanted)
    assert torch.equal(decode_one_token(bundle, 5, cache), decode_one_token(bundle, 5, whole))


def test_stop_acts_within_a_layer_of_a_slow_model(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    layer_s, ran = 0.2, []
    for block in (blocks := blocks_of(llama)):
        def slow(*args: Any, forward: Callable[..., Any] = block.forward, **kwargs: Any) -> Any:
            ran.append(None)
            time.sleep(layer_s)
            return forward(*args, **kwargs)

        monkeypatch.setattr(block, "forward", slow)
    stop, asked_s = Stop(), []

    def ask() -> None:
        asked_s.append(time.perf_counter())
        stop.request()

    timer = threading.Timer(layer_s / 2, ask)
    timer.start()
    assert prefill(llama, prompt_ids(llama), llama.cache_factory(), stop) is None
    took = time.perf_counter() - asked_s[0]
    assert len(ran) == 1 < len(blocks) and took < 0.5


def test_hooks_are_gone_after_an_error(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = hooks_of(llama)

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("broken layer")

    monkeypatch.setattr(blocks_of(llama)[1], "forward", broken)
    with pytest.raises(RuntimeError, match="broken layer"):
        prefill(llama, prompt_ids(llama), llama.cache_factory(), Stop())
    assert hooks_of(llama) == hooks
