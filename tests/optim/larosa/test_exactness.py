"""Absorbed rotations against the dense model and against an independent simulation, for every family they are absorbed into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from core.architectures import FAMILIES, REFUSED
from core.bundle import Bundle
from core.evaluation import decode_logits
from core.linear_layers import linear_weight
from core.prepared_cache import cached_prepare
from core.reversible import Edits
from core.technique import Prepared
from optim.larosa.absorption import absorb_rotations, orthogonality_error
from optim.larosa.allocation import sparse_logits
from optim.larosa.ops import rotation_of, second_moment
from optim.larosa.sites import counting, measured, sites_of
from optim.larosa.structure import norm_eps, structure_of
from optim.larosa.technique import LaRoSA
from tests.tolerances import ROTATED_64, ROTATED_LOGITS, SUM_ORDER

BundleOf = Callable[[str], Bundle]
ABSORBED = sorted(f for f in FAMILIES if (f, "larosa") not in REFUSED)
TEXT = "Machine learning is a field of artificial intelligence that learns from data, and a language model predicts the next word."


def ids_of(bundle: Bundle, count: int = 48) -> list[int]:
    ids: list[int] = bundle.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    return (ids * 4)[:count]


@torch.inference_mode()
def logits(bundle: Bundle, ids: Sequence[int]) -> Tensor:
    return bundle.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


@torch.inference_mode()
def greedy(bundle: Bundle, ids: Sequence[int], count: int) -> list[int]:
    out = bundle.model.generate(torch.tensor([list(ids)]), do_sample=False, max_new_tokens=count, min_new_tokens=count, pad_token_id=0)
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("variant", ["larosa", "larosa_threshold", "one_rotation", "online_rotation"])
@pytest.mark.parametrize("family", ABSORBED)
def test_without_sparsity_the_rotated_model_is_the_dense_one(family: str, variant: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    ids = ids_of(bundle)
    dense, answer = logits(bundle, ids), greedy(bundle, ids[:8], 64)
    technique = LaRoSA(sparsity=0.0, variant=variant)
    with technique.apply(bundle, cached_prepare(technique, bundle)):
        weight = linear_weight(structure_of(bundle.model, "test").blocks[0].get_submodule(FAMILIES[family].qkv[0]))[0]
        assert ROTATED_LOGITS.holds(logits(bundle, ids), dense)
        assert greedy(bundle, ids[:8], 64) == answer
    original = linear_weight(structure_of(bundle.model, "test").blocks[0].get_submodule(FAMILIES[family].qkv[0]))[0]
    assert not torch.allclose(weight, original, atol=0.05), "nothing was rotated"


@pytest.mark.parametrize("family", ABSORBED)
def test_rotations_are_orthogonal(family: str, family_bundle: BundleOf) -> None:
    technique = LaRoSA()
    tensors = cached_prepare(technique, family_bundle(family)).tensors
    rotations = [value for name, value in tensors.items() if name.startswith("rotation.")]
    assert len(rotations) == 2
    assert orthogonality_error(rotations) < 1e-5
    assert not torch.allclose(rotations[0], rotations[1], atol=0.05), "layers share a rotation"


class Simulation:
    """The paper's function on the untouched model: x -> gain * (Top-K(x Q) Q^T), computed at run time by hooks.

    The first position stays dense: its attention output is the same for all heads that share a key, so Top-K would meet ties.
    """

    def __init__(self, bundle: Bundle, tensors: dict[str, Tensor], keeps: dict[tuple[int, str], int]) -> None:
        self.structure = structure_of(bundle.model, "simulation")
        self.handles: list[Any] = []
        for index, block in enumerate(self.structure.blocks):
            rotation = tensors[f"rotation.{index}"].double()
            for norm in self.structure.norms:
                module = block.get_submodule(norm.name)
                self.handles.append(module.register_forward_hook(self._rotated(module, rotation, keeps[index, norm.kind])))
            for kind, name in self.structure.writers:
                if (index, kind) in keeps:
                    self.handles.append(block.get_submodule(name).register_forward_pre_hook(self._plain(keeps[index, kind])))

    @staticmethod
    def _largest(x: Tensor, keep: int) -> Tensor:
        """Top-K by sorting, in numpy."""
        rows = x.numpy().reshape(-1, x.shape[-1])
        out = np.zeros_like(rows)
        for row, kept in zip(rows, out, strict=True):
            places = np.argsort(-np.abs(row), kind="stable")[:keep]
            kept[places] = row[places]
        out[0] = rows[0]
        return torch.from_numpy(out.reshape(x.shape))

    def _rotated(self, norm: Any, rotation: Tensor, keep: int) -> Callable[..., Tensor]:
        shift = getattr(norm, "bias", None)

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            # From the norm's input: transformers' own RMSNorm rounds to float32 whatever the model's dtype.
            x = args[0] if shift is None else args[0] - args[0].mean(-1, keepdim=True)
            plain = x / (x.square().mean(-1, keepdim=True) + norm_eps(norm)).sqrt()
            return self._largest(plain @ rotation, keep) @ rotation.T * norm.weight + (0 if shift is None else shift)

        return hook

    def _plain(self, keep: int) -> Callable[..., tuple[Any, ...]]:
        return lambda module, args: (self._largest(args[0], keep), *args[1:])

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("family", ABSORBED)
def test_sparse_model_equals_an_independent_simulation(family: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    technique = LaRoSA(sparsity=0.5, prefill=True, exempt=1)
    prepared = cached_prepare(technique, bundle)
    bundle.model.double()
    # Eigenvectors kept as float32 are orthogonal to 1e-7 only; as written they turn the function by that much.
    tensors = {name: torch.linalg.qr(value.double())[0] for name, value in prepared.tensors.items()}
    ids = ids_of(bundle, 24)
    with technique.apply(bundle, Prepared(tensors, prepared.meta)):
        structure = structure_of(bundle.model, "test")
        kinds = [norm.kind for norm in structure.norms] + ["output", "down"]
        places = [(index, kind) for index in range(len(structure.blocks)) for kind in kinds]
        keeps = {place: site.keep for place, site in zip(places, sites_of_in_order(bundle, kinds), strict=True) if hasattr(site, "keep")}
        ours = logits(bundle, ids)
    dense = logits(bundle, ids)
    simulation = Simulation(bundle, tensors, keeps)
    with torch.no_grad():
        simulated = bundle.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    simulation.remove()
    assert ROTATED_64.holds(ours, simulated)
    assert float((ours - dense).abs().max()) > 0.01, "sparsity 0.5 changed nothing"


def sites_of_in_order(bundle: Bundle, kinds: Sequence[str]) -> list[Any]:
    """Sites block by block, in each block by `kinds`."""
    by_kind = {kind: [s for s in sites_of(bundle.model) if s.kind == kind] for kind in kinds}
    return [by_kind[kind][index] for index in range(len(by_kind[kinds[0]])) for kind in kinds]


@pytest.mark.parametrize("variant", ["larosa", "larosa_threshold", "topk", "teal", "cats"])
def test_one_forward_call_equals_decoding_token_by_token(variant: str, llama: Bundle) -> None:
    technique = LaRoSA(sparsity=0.4, variant=variant)
    ids = ids_of(llama, 40)
    with technique.apply(llama, cached_prepare(technique, llama)):
        structure = structure_of(llama.model, "test")
        together = sparse_logits(structure, sites_of(llama.model), torch.tensor([ids]), technique.exempt)
        by_token = decode_logits(llama, ids[:4], ids[4:])
    assert SUM_ORDER.holds(together, by_token)


@pytest.mark.parametrize("sparsity", [0.25, 0.4, 0.5, 0.75])
@pytest.mark.parametrize("family", ABSORBED)
def test_measured_sparsity_is_the_stated_one(family: str, sparsity: float, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    technique = LaRoSA(sparsity=sparsity)
    with technique.apply(bundle, cached_prepare(technique, bundle)):
        sites = sites_of(bundle.model)
        with counting(sites):
            decode_logits(bundle, ids_of(bundle, 6), ids_of(bundle, 10))
        seen = measured(structure_of(bundle.model, "test"), sites)
    assert seen.sparsity == pytest.approx(sparsity, abs=0.01)
    if family == "opt":
        assert seen.exact_zeros is not None and 0.2 < seen.exact_zeros < 0.8
        assert "down" not in seen.kinds


def test_exact_zeros_of_a_relu_are_left_as_they_are(family_bundle: BundleOf) -> None:
    bundle = family_bundle("opt")
    technique = LaRoSA(sparsity=0.5, variant="topk")
    seen: list[tuple[Tensor, Tensor]] = []
    with technique.apply(bundle, cached_prepare(technique, bundle)):
        site = next(s for s in sites_of(bundle.model) if s.kind == "down")
        site.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
        decode_logits(bundle, ids_of(bundle, 6), ids_of(bundle, 3))
    assert seen and all(torch.equal(a, b) for a, b in seen)
    assert any(bool((a == 0).any()) for a, _ in seen)


def test_independent_numpy_rotation_of_two_layers(family_bundle: BundleOf) -> None:
    """Weights after absorption, computed once more in numpy from the paper's formulae."""
    bundle = family_bundle("llama")
    model: Any = bundle.model
    rotations = [rotation_of(second_moment(torch.randn(200, 64))) for _ in range(2)]
    q0, q1 = (r.numpy() for r in rotations)
    as_np = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    edits = Edits()
    absorb_rotations(structure_of(bundle.model, "test"), rotations, edits)
    gain = as_np["model.layers.1.input_layernorm.weight"]
    wanted = {
        "model.embed_tokens.weight": as_np["model.embed_tokens.weight"] @ q0,
        "model.layers.0.self_attn.q_proj.weight": as_np["model.layers.0.self_attn.q_proj.weight"] * as_np["model.layers.0.input_layernorm.weight"] @ q0,
        "model.layers.0.self_attn.o_proj.weight": q0.T @ as_np["model.layers.0.self_attn.o_proj.weight"],
        "model.layers.1.self_attn.v_proj.weight": as_np["model.layers.1.self_attn.v_proj.weight"] * gain @ q1,
        "model.layers.1.mlp.down_proj.weight": q1.T @ as_np["model.layers.1.mlp.down_proj.weight"],
        "model.layers.1.residual_adapter.linear.weight": (q0.T @ q1).T,
        "lm_head.weight": as_np["model.embed_tokens.weight"] * as_np["model.norm.weight"] @ q1,
    }
    for name, value in wanted.items():
        assert np.abs(model.get_parameter(name).detach().numpy() - value).max() < 1e-5, name
    assert model.config.tie_word_embeddings is False
    edits.undo()
    assert model.lm_head.weight is model.model.embed_tokens.weight
