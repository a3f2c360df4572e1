"""int8 and nf4 layers against references dequantised in numpy; which layers, which bytes, which label."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from compression.quant.modules import fused_nf4_runs, int8_linear, nf4_linear
from compression.quant.packed import Int4, Int8
from compression.quant.technique import BnbInt8, BnbNf4, quantisable_layers
from core.architectures import FAMILIES
from core.bundle import Bundle, storage_bytes, tensors_of
from core.errors import InvalidRequest, UnsupportedModel
from core.linear_layers import linear_weight
from core.technique import Label
from tests import contract, families
from tests.known import known_bug
from tests.tolerances import INT8_CODE, INT8_NORM, NF4_FUSED_NORM, NF4_UNPACKED

BundleOf = Callable[[str], Bundle]
Array = NDArray[np.float64]
# (in, out): taken by the fused kernel, several scales a row, not divisible by 32 or 64, odd, smaller than a block.
SHAPES = [(64, 64), (256, 32), (128, 96), (48, 144), (100, 36), (65, 33), (7, 3), (2, 5)]
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
ROWS_ACROSS_BLOCKS = known_bug("bitsandbytes 0.50.2 unpacks nf4 wrongly on AVX-512 CPUs where in_features is a multiple of 16 and not of block_size", AVX512)
# The 16 values of NormalFloat4, from the QLoRA paper's appendix E.
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])


@pytest.fixture(autouse=True)
def no_compiler() -> Iterator[None]:
    """bitsandbytes compiles its unpacking of odd shapes, which takes seconds; it runs eagerly here."""
    with torch._dynamo.config.patch(disable=True):
        yield


def layer_of(shape: tuple[int, int], kind: type[nn.Module] = nn.Linear, bias: bool = True) -> nn.Module:
    inside, outside = shape
    layer = Conv1D(outside, inside) if kind is Conv1D else nn.Linear(inside, outside, bias=bias)
    nn.init.normal_(layer.weight, std=0.5)
    if layer.bias is not None:
        nn.init.normal_(layer.bias)
    layer.requires_grad_(False).eval()
    for _ in range(9):  # no weight half-way between two codes, where the last bit of fp32 decides
        if (edges := nf4_edges(layer)).any():
            layer.weight[edges] += 1e-3
    return layer


def nf4_edges(layer: nn.Module) -> Tensor:
    """Which weights lie at the middle between two of the 16 values, for any block size used here."""
    weight = linear_weight(layer)[0]
    found = torch.zeros_like(weight, dtype=torch.bool)
    for block in (64, 128, 256, 1024):
        flat = nn.functional.pad(weight.reshape(-1), (0, -weight.numel() % block)).view(-1, block)
        share = (flat / flat.abs().amax(1, keepdim=True)).reshape(-1)[: weight.numel()]
        middles = torch.from_numpy((NF4[1:] + NF4[:-1]) / 2)
        found |= ((share.double()[:, None] - middles).abs().amin(1) < 1e-6).view_as(weight)
    return found.T if isinstance(layer, Conv1D) else found


def unpacked_wrongly(width: int, block: int) -> bool:
    """Where the installed bitsandbytes is known to give wrong weights."""
    return AVX512 and width % 16 == 0 and width % block != 0


def rows(width: int, count: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def int8_codes(values: Array) -> tuple[Array, Array, Array]:
    """Rows, passed through fp16, as 127ths of their largest value: rounded, exact, and that value."""
    values = values.astype(np.float16).astype(np.float64)
    scale = np.abs(values).max(1, keepdims=True)
    exact = values * 127 / np.where(scale == 0, 1, scale)
    return np.rint(exact), exact, scale


def int8_reference(weight: Array, bias: Array | None, x: Tensor) -> Array:
    """Weights and activations as int8 per row, an exact integer product, scaled back."""
    codes, _, scale = int8_codes(weight)
    levels, _, peak = int8_codes(array(x))
    out = (levels @ codes.T) * (peak / 127) * (scale.T / 127)
    return out if bias is None else out + bias


def nf4_dequantised(weight: Array, block: int) -> Array:
    """Each block of the flat weight divided by its largest value and moved to the nearest of 16 values."""
    flat = weight.reshape(-1)
    out = np.empty_like(flat)
    for start in range(0, len(flat), block):
        part = flat[start : start + block]
        peak = np.abs(part).max()
        nearest = np.abs(part[:, None] / (peak or 1) - NF4).argmin(1)
        out[start : start + block] = NF4[nearest] * peak
    return out.reshape(weight.shape)


def nf4_reference(weight: Array, bias: Array | None, x: Tensor, block: int) -> Array:
    out = array(x) @ nf4_dequantised(weight, block).T
    return out if bias is None else out + bias


def weight_and_bias(layer: nn.Module) -> tuple[Array, Array | None]:
    weight = array(layer.weight)
    return weight.T if isinstance(layer, Conv1D) else weight, None if layer.bias is None else array(layer.bias)


def assert_int8_output(got: Tensor, weight: Array, bias: Array | None, x: Tensor) -> None:
    wanted = int8_reference(weight, bias, x)
    assert np.linalg.norm(array(got) - wanted) < INT8_NORM * np.linalg.norm(wanted)


@torch.inference_mode()
def run(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


# One layer.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_output_equals_a_numpy_reference(shape: tuple[int, int], bias: bool) -> None:
    layer, x = layer_of(shape, bias=bias), rows(shape[0])
    got = run(int8_linear(layer, threshold=0.0), x)
    assert_int8_output(got, *weight_and_bias(layer), x)
    assert not torch.equal(got, run(layer, x)) and got.dtype == torch.float32


def test_int8_codes_and_scales_equal_a_numpy_reference() -> None:
    layer = layer_of((100, 36))
    new = int8_linear(layer, 6.0)
    _, exact, scale = int8_codes(array(layer.weight))
    codes = array(new.state.CB)
    assert new.weight.dtype == torch.int8 and np.abs(codes - exact).max() <= INT8_CODE
    assert np.array_equal(array(new.state.SCB), scale[:, 0])
    assert np.abs(codes).max(1).min() == 127  # every row uses its whole range


def assert_nf4_equals_reference(layer: nn.Module, block: int, double_quant: bool = False) -> None:
    new, x = nf4_linear(layer, block, double_quant), rows(linear_weight(layer)[0].shape[1])
    got, wanted = run(new, x), torch.from_numpy(nf4_reference(*weight_and_bias(layer), x, block))
    if fused_nf4_runs(new, block):
        bias = 0 if layer.bias is None else layer.bias
        assert float((got - wanted).norm() / (wanted - bias).norm()) < NF4_FUSED_NORM
    else:
        assert NF4_UNPACKED.holds(got, wanted)
    assert not torch.equal(got, run(layer, x)) and got.dtype == torch.float32


def nf4_cases() -> list[object]:
    cases = [(shape, block) for shape in SHAPES for block in (64, 128, 256)]
    return [pytest.param(s, b, id=f"{s}-{b}", marks=ROWS_ACROSS_BLOCKS if unpacked_wrongly(s[0], b) else ()) for s, b in cases]


@pytest.mark.parametrize(("shape", "block"), nf4_cases())
def test_nf4_output_equals_a_numpy_reference(shape: tuple[int, int], block: int) -> None:
    assert_nf4_equals_reference(layer_of(shape), block)


@pytest.mark.parametrize("shape", [(64, 64), (128, 36), (65, 33)], ids=str)
def test_nf4_without_bias_equals_a_numpy_reference(shape: tuple[int, int]) -> None:
    layer = layer_of(shape, bias=False)
    assert nf4_linear(layer, 64, double_quant=False).bias is None
    assert_nf4_equals_reference(layer, 64)


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (48, 144), (33, 17)], ids=str)
def test_conv1d_is_quantised_as_the_linear_layer_it_stands_for(shape: tuple[int, int]) -> None:
    conv, x = layer_of(shape, Conv1D), rows(shape[0])
    twin = nn.Linear(*shape).requires_grad_(False)
    twin.weight.copy_(conv.weight.T)
    twin.bias.copy_(conv.bias)
    assert torch.allclose(run(conv, x), run(twin, x), atol=1e-5)
    for quantise in (lambda layer: int8_linear(layer, 0.0), lambda layer: nf4_linear(layer, 64, False)):
        assert torch.equal(run(quantise(conv), x), run(quantise(twin), x))
    assert_int8_output(run(int8_linear(conv, 0.0), x), *weight_and_bias(conv), x)
    if not unpacked_wrongly(shape[0], 64):
        assert_nf4_equals_reference(conv, 64)


def test_linear_weight_is_out_by_in_for_both_kinds() -> None:
    linear, conv = layer_of((5, 3)), layer_of((5, 3), Conv1D)
    assert linear_weight(linear)[0].shape == linear_weight(conv)[0].shape == (3, 5)
    assert torch.equal(linear_weight(conv)[0], conv.weight.T) and torch.equal(linear_weight(linear)[1], linear.bias)
    assert linear_weight(layer_of((5, 3), bias=False))[1] is None


@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 64), (1, 1, 64)], ids=str)
def test_any_batch_shape_goes_through(shape: tuple[int, ...]) -> None:
    layer = layer_of((64, 64))
    x = torch.randn(shape)
    for new in (int8_linear(layer, 0.0), nf4_linear(layer, 64, False), nf4_linear(layer, 128, False)):
        flat = run(new, x.reshape(-1, 64)).reshape(*shape[:-1], 64)
        assert float((run(new, x) - flat).norm() / flat.norm()) < NF4_FUSED_NORM


def test_int8_keeps_outlier_columns_in_full_precision_above_the_threshold() -> None:
    layer, x = layer_of((64, 64)), rows(64)
    x[:, 5] = 60.0
    exact = run(layer, x)
    without, beyond, with_them = (float((run(int8_linear(layer, t), x) - exact).abs().max()) for t in (0.0, 100.0, 6.0))
    assert with_them < without / 3 and beyond > with_them


@pytest.mark.parametrize("quantise", [lambda layer: int8_linear(layer, 0.0), lambda layer: int8_linear(layer, 6.0), lambda layer: nf4_linear(layer, 64, False), lambda layer: nf4_linear(layer, 128, True)])
def test_zero_weights_and_zero_inputs_give_the_bias(quantise: Callable[[nn.Module], nn.Module]) -> None:
    layer, x = layer_of((64, 64)), rows(64)
    layer.weight[3] = 0
    layer.weight[4:6] = 0  # two rows of 64: a whole block of any size
    x[1] = 0
    got = run(quantise(layer), x)
    assert got.isfinite().all() and torch.allclose(got[:, 3:6], layer.bias[3:6].expand(5, 3), atol=0.02)
    assert torch.allclose(got[1], layer.bias, atol=0.02)


@pytest.mark.parametrize("kind", ["int8", "nf4 fused", "nf4 unpacked", "nf4 double"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantising_leaves_the_original_layer_alone(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_of((128, 64)).to(dtype), rows(128).to(dtype)
    weight, bias, output = layer.weight.clone(), layer.bias.clone(), run(layer, x)
    new = {"int8": lambda: int8_linear(layer, 6.0), "nf4 fused": lambda: nf4_linear(layer, 64, False), "nf4 unpacked": lambda: nf4_linear(layer, 256, False),
           "nf4 double": lambda: nf4_linear(layer, 64, True)}[kind]()
    run(new, x)
    assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias) and torch.equal(run(layer, x), output)
    originals = storage_bytes(tensors_of([layer]))
    assert not set(storage_bytes(tensors_of([new]))) & set(originals)
    assert run(new, x).dtype == dtype


@pytest.mark.parametrize("quantise", [lambda layer: int8_linear(layer, 6.0), lambda layer: nf4_linear(layer, 64, False)])
def test_quantised_layer_is_frozen_and_in_eval_mode(quantise: Callable[[nn.Module], nn.Module]) -> None:
    new = quantise(layer_of((64, 64)))
    assert not new.training and not any(p.requires_grad for p in new.parameters())


@pytest.mark.parametrize("shape", [(1024, 64), (1024, 36)], ids=str)
def test_larger_blocks_and_double_scales_cost_accuracy_and_save_bytes(shape: tuple[int, int]) -> None:
    layer, x = layer_of(shape), rows(1024, 64)
    exact = run(layer, x)

    def error_and_bytes(block: int, double: bool) -> tuple[float, int]:
        new = nf4_linear(layer, block, double)
        return float((run(new, x) - exact).norm() / exact.norm()), sum(storage_bytes(tensors_of([new])).values())

    small, large = error_and_bytes(64, False), error_and_bytes(1024, False)
    assert 0.05 < small[0] < large[0] < 0.2 and large[1] < small[1]
    int8 = float((run(int8_linear(layer, 0.0), x) - exact).norm() / exact.norm())
    assert 0.002 < int8 < 0.02 < small[0]


def test_reading_the_state_dict_does_not_change_a_fused_nf4_layer() -> None:
    new, x = nf4_linear(layer_of((256, 32)), 64, False), rows(256)
    if not fused_nf4_runs(new, 64):
        pytest.xfail("NOT RUN: the fused kernel does not run on this CPU")
    before = run(new, x)
    new.state_dict()
    assert torch.equal(run(new, x), before)


@pytest.mark.parametrize("quantise", [lambda layer: int8_linear(layer, 6.0), lambda layer: nf4_linear(layer, 64, True), lambda layer: nf4_linear(layer, 128, False)])
def test_reading_the_state_dict_does_not_change_other_layers(quantise: Callable[[nn.Module], nn.Module]) -> None:
    new, x = quantise(layer_of((100, 36))), rows(100)
    before = run(new, x)
    new.state_dict()
    assert torch.equal(run(new, x), before)


# A whole model.


def paths_of(model: nn.Module) -> list[str]:
    return [path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D)) and path != "lm_head"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_all_linear_layers_but_the_head_are_quantisable(family: str, family_bundle: BundleOf) -> None:
    model = family_bundle(family).model
    found = [path for path, _ in quantisable_layers(model)]
    assert found == paths_of(model)
    assert set(FAMILIES[family].projections(model)) <= set(found)
    assert ("model.decoder.project_in" in found) is (family == "opt_post_norm")


@pytest.mark.parametrize(("family", "block"), [*((family, 64) for family in sorted(FAMILIES)), ("llama", 128)])
def test_every_nf4_layer_of_a_model_has_the_weights_of_the_reference(family: str, block: int, family_bundle: BundleOf) -> None:
    """Layers that bitsandbytes would compute wrongly on this machine are left as they are, and the report says so."""
    bundle = family_bundle(family)
    plain = {path: weight_and_bias(layer) for path, layer in quantisable_layers(bundle.model)}
    with contract.apply(BnbNf4(block_size=block), bundle) as applied:
        assert applied.report.touched and {*applied.report.touched, *applied.report.skipped} == {*plain, "output head"}
        for path in applied.report.skipped.keys() & plain.keys():
            assert AVX512 and plain[path][0].shape[1] % block and "no multiple of the block" in applied.report.skipped[path]
            assert isinstance(bundle.model.get_submodule(path), (nn.Linear, Conv1D)) and bundle.model.get_submodule(path).weight.is_floating_point()
        for path in applied.report.touched:
            weight, bias = plain[path]
            eye = torch.eye(weight.shape[1])
            got = array(run(bundle.model.get_submodule(path), eye)).T - (0 if bias is None else bias[:, None])
            wanted = nf4_dequantised(weight, block)
            assert np.linalg.norm(got - wanted) < NF4_FUSED_NORM * np.linalg.norm(wanted), path


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_int8_layer_of_a_model_computes_the_reference(family: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    plain = {path: weight_and_bias(layer) for path, layer in quantisable_layers(bundle.model)}
    with contract.apply(BnbInt8(), bundle) as applied:
        assert set(applied.report.touched) == set(plain)
        for path, (weight, bias) in plain.items():
            x = rows(weight.shape[1])
            assert_int8_output(run(bundle.model.get_submodule(path), x), weight, bias, x)


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
def test_nf4_whose_block_fits_no_layer_is_refused_where_it_is_computed_wrongly(llama: Bundle, capability: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with pytest.raises(UnsupportedModel, match="256") if capability == "AVX512" else contextlib.nullcontext():
        BnbNf4(block_size=256).check(llama)


def test_share_is_taken_of_the_layers_that_can_be_quantised(family_bundle: BundleOf) -> None:
    contract.check_effect_is_real(BnbNf4(share=0.1), family_bundle("gpt2"))  # its attention is 48 wide, the end of its MLP 192


def test_share_is_not_rounded_up_by_the_last_bit(tokenizer: PreTrainedTokenizerBase, llama: Bundle) -> None:
    llama.model = families.make_model("gpt2", tokenizer, n_layer=25, n_embd=16)
    with contract.apply(BnbInt8(share=0.55), llama) as applied:
        assert len(applied.report.touched) == 55


@pytest.mark.parametrize(("technique", "limit"), [(BnbInt8(), 0.1), (BnbInt8(threshold=0.0), 0.1), (BnbNf4(), 0.5)], ids=str)
def test_quantised_model_stays_near_the_plain_one(technique: BnbInt8 | BnbNf4, limit: float, llama: Bundle) -> None:
    plain = contract.logits_of(llama)
    with contract.apply(technique, llama):
        error = float((contract.logits_of(llama) - plain).norm() / plain.norm())
    assert 1e-3 < error < limit


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 7), (1.0, 14), (0.25, 4), (0.95, 14), (0.01, 1)])
@pytest.mark.parametrize("kind", [BnbInt8, BnbNf4])
def test_share_takes_the_first_layers_and_says_why_others_are_skipped(kind: type[BnbInt8] | type[BnbNf4], share: float, expected: int, llama: Bundle) -> None:
    paths = paths_of(llama.model)
    assert len(paths) == 14
    with contract.apply(kind(share=share), llama) as applied:
        report = applied.report
        assert list(report.touched) == paths[:expected]
        assert [path for path in report.skipped if path != "output head"] == paths[expected:]
        assert all(f"beyond the first {share:.0%}" in report.skipped[path] for path in paths[expected:])
        assert "full precision" in report.skipped["output head"]
        changed = [path for path, module in llama.model.named_modules() if isinstance(module, (bnb.nn.Linear8bitLt, bnb.nn.Linear4bit))]
        assert changed == paths[:expected] and len(applied.packed) == expected


@pytest.mark.parametrize("kind", [BnbInt8, BnbNf4])
def test_smallest_share_takes_a_layer(kind: type[BnbInt8] | type[BnbNf4], llama: Bundle) -> None:
    contract.check_effect_is_real(kind(share=0.01), llama)


def test_more_layers_quantised_move_the_logits_more(llama: Bundle) -> None:
    plain, moved = contract.logits_of(llama), []
    for share in (0.0, 0.5, 1.0):
        with contract.apply(BnbNf4(share=share), llama):
            moved.append(float((contract.logits_of(llama) - plain).norm()))
    assert moved[0] == 0.0 < moved[1] < moved[2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_bytes_are_those_of_codes_scales_and_biases(family: str, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    layers = dict(quantisable_layers(bundle.model))

    def sums(paths: tuple[str, ...]) -> tuple[list[int], int, int]:
        touched = [layers[path] for path in paths]
        outputs = sum(linear_weight(layer)[0].shape[0] for layer in touched)
        return [layer.weight.numel() for layer in touched], outputs, sum(layer.bias.nbytes for layer in touched if layer.bias is not None)

    with contract.apply(BnbInt8(), bundle) as applied:
        elements, outputs, biases = sums(applied.report.touched)
        assert applied.report.bytes_before == 4 * sum(elements) + biases
        assert applied.report.bytes_after == sum(elements) + 4 * outputs + biases
    with contract.apply(BnbNf4(), bundle) as applied:
        elements, _, biases = sums(applied.report.touched)
        codes, scales = sum((n + 1) // 2 for n in elements), sum(-(-n // 64) for n in elements)
        # Scales are bf16 where the fused kernel runs and fp32 elsewhere; each layer may hold its table of 16 values.
        assert codes + 2 * scales <= applied.report.bytes_after - biases <= codes + 4 * scales + 64 * len(elements)


class Ops(TorchDispatchMode):
    """Counts the bitsandbytes operators a forward really calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "bitsandbytes":
            self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("family", "block"), [("llama", 64), ("llama", 128), ("gpt2", 64), ("opt_post_norm", 64), ("opt_post_norm", 128)])
def test_nf4_label_is_what_the_forward_does(family: str, block: int, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    ids = torch.tensor([[5, 6, 7]])
    with contract.apply(BnbNf4(block_size=block), bundle) as applied, torch.inference_mode():
        with Ops() as ops:
            bundle.model(input_ids=ids, use_cache=False)
        layers = len(applied.packed)
        packed = ops.names.count("gemv_4bit")  # computes with the codes; the others unpack the layer first
        assert packed + ops.names.count("gemm_4bit") == layers
        assert applied.report.label is (Label.EXECUTED if layers and packed == layers else Label.STORED)
        assert f"{packed} of {layers} layers compute with the packed weights" in applied.report.notes[0]


def test_int8_label_is_what_the_forward_does(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch._int_mm

    def counted(*args: Tensor) -> Tensor:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(torch, "_int_mm", counted)
    with contract.apply(BnbInt8(), llama) as applied, torch.inference_mode():
        llama.model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False)
        assert len(calls) == (len(applied.packed) if applied.report.label is Label.EXECUTED else 0)


def test_label_without_a_packed_kernel_is_stored(llama: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with contract.apply(BnbInt8(), llama) as applied:
        assert applied.report.label is Label.STORED and "0 of 14" in applied.report.notes[0]
    monkeypatch.setattr(bnb.functional, "has_avx512bf16", lambda: False)
    with contract.apply(BnbNf4(), llama) as applied:
        assert applied.report.label is Label.STORED and "0 of 14" in applied.report.notes[0]
        assert contract.logits_of(llama).isfinite().all()


def test_nothing_quantised_is_not_called_executed(llama: Bundle) -> None:
    with contract.apply(BnbInt8(share=0.0), llama) as applied:
        assert applied.report.label is Label.STORED and applied.report.touched == ()
        assert applied.report.bytes_before == applied.report.bytes_after == 0


def test_model_already_quantised_throughout_is_refused(llama: Bundle) -> None:
    with contract.apply(BnbInt8(), llama), pytest.raises(UnsupportedModel, match="no full-precision linear layer"):
        BnbInt8().check(llama)


@pytest.mark.parametrize("settings", [{"share": -0.1}, {"share": 1.1}, {"share": float("nan")}, {"threshold": -1}, {"threshold": 101}, {"threshold": "6"}])
def test_int8_options_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        BnbInt8(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{"block_size": 32}, {"block_size": 100}, {"block_size": True}, {"double_quant": 1}, {"double_quant": None}])
def test_nf4_options_out_of_range_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest):
        BnbNf4(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("head", [True, False])
def test_int4_weights_come_from_the_disk_the_second_time_and_compute_the_same(head: bool, llama: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEBOX_CACHE", str(tmp_path))
    monkeypatch.setattr("kernels.kept_packings.LEAST_ELEMENTS", 1)
    notes, logits = [], []
    for _ in range(2):
        with contract.apply(Int4(head=head), llama) as applied:
            notes.append(applied.report.notes[1])
            logits.append(contract.logits_of(llama))
    assert notes[0].startswith("0 of 14 packed weights") and notes[1].startswith("14 of 14 packed weights")
    assert torch.equal(logits[0], logits[1])
    with contract.apply(Int8(head=head), llama) as applied:
        assert len(applied.report.notes) == 1, "int8 is packed faster than it is read"
