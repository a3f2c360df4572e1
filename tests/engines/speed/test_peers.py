"""Rivals run the same model as torch. Skipped where requirements-peers.txt is not installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from core.bundle import Bundle
from engines.speed.peers.gguf_writer import FORMS, gguf_tensors, rotary_pairs_together, write_gguf
from engines.speed.peers.peer import LlamaShape, Peer
from engines.speed.sides import cosine, prompt
from tests.tolerances import NATIVE, PEER_F16, PEER_INT8_COSINE, Tolerance

CONTEXT, STEPS = 40, 32


def needs(*modules: str) -> pytest.MarkDecorator:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"NOT RUN: {', '.join(missing)} not installed (requirements-peers.txt)")


def test_turning_neighbours_of_the_new_order_is_turning_halves_of_the_old() -> None:
    heads, dim, hidden = 3, 8, 5
    weight, x, angles = torch.randn(heads * dim, hidden), torch.randn(hidden), torch.arange(1.0, dim // 2 + 1)
    old, new = (weight @ x).view(heads, dim), (rotary_pairs_together(weight, heads) @ x).view(heads, dim)
    a, b = old.chunk(2, 1)
    halves = torch.stack([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], 2)
    first, second = new[:, ::2], new[:, 1::2]
    neighbours = torch.stack([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], 2)
    assert torch.allclose(halves, neighbours, atol=1e-6) and not torch.equal(old, new)


@needs("gguf")
@pytest.mark.parametrize("form", FORMS)
def test_file_holds_every_weight_in_its_form(llama: Bundle, tmp_path: Path, form: str) -> None:
    import gguf

    read = write_gguf(llama, tmp_path / "m.gguf", form)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = {t.name: t for t in reader.tensors}
    shape = LlamaShape.of(llama, "llama.cpp")
    wanted = dict(gguf_tensors(llama, shape))
    assert set(stored) == set(wanted) and ("output.weight" in stored) is not shape.tied
    for name, tensor in wanted.items():
        values = torch.from_numpy(gguf.dequantize(stored[name].data, stored[name].tensor_type).astype(np.float32)).view(tensor.shape)
        bits = {"F16": 2**-10, "BF16": 2**-7, "Q8_0": 1 / 127, "Q4_0": 1 / 7}[form if tensor.ndim > 1 else "F16"]
        assert (values - tensor).abs().max() <= bits * tensor.abs().max(), name
        assert stored[name].tensor_type.name == (form if tensor.ndim > 1 else "F32")
    assert read == sum(int(t.n_bytes) for n, t in stored.items() if shape.tied or n != "token_embd.weight")
    assert reader.get_field("llama.rope.freq_base").contents() == 5000.0


def check_against_torch(peer: Peer, bundle: Bundle, tolerance: Tolerance) -> None:
    """Logits after a prompt, the greedy tokens after it, and the first of them again after `crop`."""
    ids = prompt(CONTEXT)
    logits, first = peer.prefill(ids).copy(), None
    for step in range(STEPS):
        with torch.inference_mode():
            wanted = bundle.model(torch.tensor([ids])).logits[0, -1]
        assert tolerance.holds(torch.from_numpy(logits), wanted), f"step {step}: {np.abs(logits - wanted.numpy()).max()}"
        assert int(logits.argmax()) == int(wanted.argmax())
        ids.append(int(wanted.argmax()))
        logits = peer.decode(ids[-1]).copy()
        first = logits if first is None else first
    peer.crop(STEPS)
    again = peer.decode(ids[CONTEXT])
    assert tolerance.holds(torch.from_numpy(again.copy()), torch.from_numpy(first))


@needs("gguf", "llama_cpp")
@pytest.mark.parametrize("flash", [False, True])
def test_llama_cpp_agrees_with_torch(llama: Bundle, flash: bool) -> None:
    from engines.speed.peers.llama_cpp_runner import LlamaCpp

    peer = LlamaCpp.over(llama, "F16", CONTEXT + STEPS)
    peer._flash = flash
    check_against_torch(peer, llama, PEER_F16)


@needs("gguf", "llama_cpp")
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_llama_cpp_in_8_bits_is_the_same_model_and_says_what_it_chose(llama: Bundle, phase: str) -> None:
    from engines.speed.peers.llama_cpp_runner import LlamaCpp

    peer, ids = LlamaCpp.over(llama, "Q8_0", CONTEXT + STEPS), prompt(CONTEXT)
    peer.settle(ids, phase)
    assert peer.settings["flash_attention"] in (True, False) and "AVX" in peer.settings["system_info"]
    with torch.inference_mode():
        assert cosine(peer.prefill(ids), llama.model(torch.tensor([ids])).logits[0, -1].numpy()) > PEER_INT8_COSINE


@needs("openvino")
def test_openvino_agrees_with_torch(llama: Bundle) -> None:
    from engines.speed.peers.openvino_runner import OpenVino

    check_against_torch(OpenVino.over(llama, "float32"), llama, NATIVE)


@needs("openvino")
def test_openvino_in_8_bits_is_the_same_model_in_the_plugins_fused_operations(llama: Bundle) -> None:
    from engines.speed.peers.openvino_runner import OpenVino

    peer, ids = OpenVino.over(llama), prompt(CONTEXT)
    with torch.inference_mode():
        assert cosine(peer.prefill(ids), llama.model(torch.tensor([ids])).logits[0, -1].numpy()) > PEER_INT8_COSINE
    ran, layers = peer.settings["operations"], LlamaShape.of(llama, "openvino").layers
    assert (ran["RoPE"], ran["ScaledDotProductAttention"], ran["RMS"]) == (2 * layers, layers, 2 * layers + 1)
    assert ran["FullyConnected"] == 7 * layers + 1 and ran["MemoryInput"] == 2 * layers
    assert ran["Concatenation"] <= 2  # one for each cache would mean that attention does not hold it
    floats = OpenVino.over(llama, "float32")
    assert floats.weight_bytes > 3.5 * peer.weight_bytes
