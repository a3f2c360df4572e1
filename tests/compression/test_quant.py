"""int8 and nf4 layers against references dequantised in numpy; which layers, which bytes, which label."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import bitsandbytes as bnb
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from compression.quant.modules import fused_nf4_runs, int8_linear, linear_weight, nf4_linear
from compression.quant.technique import BnbInt8, BnbNf4, quantisable_layers
from core.architectures import FAMILIES
from core.bundle import Bundle, storage_bytes, tensors_of
from core.errors import InvalidRequest, UnsupportedModel
from core.technique import Label
from tests import contract
from tests.known import known_bug
from tests.tolerances import INT8_OUTPUT, NF4_FUSED, NF4_UNPACKED

BundleOf = Callable[[str], Bundle]
Array = NDArray[np.float64]
# (in, out): taken by the fused kernel, several scales a row, not divisible by 32 or 64, odd, smaller than a block.
SHAPES = [(64, 64), (256, 32), (128, 96), (48, 144), (100, 36), (65, 33), (7, 3), (1, 5)]
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
    return layer.requires_grad_(False).eval()


def rows(width: int, count: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(3))


def array(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def int8_reference(weight: Array, bias: Array | None, x: Tensor) -> Array:
    """Rows of weights and of activations rounded to 127ths of their largest value; everything from scratch, inputs through fp16."""
    weight = weight.astype(np.float16).astype(np.float64)
    scale = np.abs(weight).max(1, keepdims=True)
    codes = np.rint(weight / np.where(scale == 0, 1, scale) * 127)
    inputs = array(x.to(torch.float16))
    peak = np.abs(inputs).max(1, keepdims=True)
    levels = np.rint(inputs / np.where(peak == 0, 1, peak) * 127)
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


@torch.inference_mode()
def run(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x)


# One layer.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_output_equals_a_numpy_reference(shape: tuple[int, int], bias: bool) -> None:
    layer, x = layer_of(shape, bias=bias), rows(shape[0])
    got = run(int8_linear(layer, threshold=0.0), x)
    assert INT8_OUTPUT.holds(got, torch.from_numpy(int8_reference(*weight_and_bias(layer), x)))
    assert not torch.equal(got, run(layer, x)) and got.dtype == torch.float32


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nf4_output_equals_a_numpy_reference(shape: tuple[int, int], block: int) -> None:
    layer, x = layer_of(shape), rows(shape[0])
    new = nf4_linear(layer, block, double_quant=False)
    tolerance = NF4_FUSED if fused_nf4_runs(new, block) else NF4_UNPACKED
    got = run(new, x)
    assert tolerance.holds(got, torch.from_numpy(nf4_reference(*weight_and_bias(layer), x, block)))
    assert not torch.equal(got, run(layer, x)) and got.dtype == torch.float32


@pytest.mark.parametrize("shape", [(64, 64), (48, 144), (65, 33)], ids=str)
def test_nf4_without_bias_equals_a_numpy_reference(shape: tuple[int, int]) -> None:
    layer, x = layer_of(shape, bias=False), rows(shape[0])
    new = nf4_linear(layer, 64, double_quant=False)
    assert new.bias is None
    tolerance = NF4_FUSED if fused_nf4_runs(new, 64) else NF4_UNPACKED
    assert tolerance.holds(run(new, x), torch.from_numpy(nf4_reference(*weight_and_bias(layer), x, 64)))


@pytest.mark.parametrize("shape", [(64, 64), (64, 96), (48, 144), (33, 17)], ids=str)
def test_conv1d_is_quantised_as_the_linear_layer_it_stands_for(shape: tuple[int, int]) -> None:
    conv, x = layer_of(shape, Conv1D), rows(shape[0])
    twin = nn.Linear(*shape).requires_grad_(False)
    twin.weight.copy_(conv.weight.T)
    twin.bias.copy_(conv.bias)
    assert torch.allclose(run(conv, x), run(twin, x), atol=1e-5)
    for quantise in (lambda layer: int8_linear(layer, 0.0), lambda layer: nf4_linear(layer, 64, False)):
        assert torch.equal(run(quantise(conv), x), run(quantise(twin), x))
    assert INT8_OUTPUT.holds(run(int8_linear(conv, 0.0), x), torch.from_numpy(int8_reference(*weight_and_bias(conv), x)))


def test_linear_weight_is_out_by_in_for_both_kinds() -> None:
    linear, conv = layer_of((5, 3)), layer_of((5, 3), Conv1D)
    assert linear_weight(linear)[0].shape == linear_weight(conv)[0].shape == (3, 5)
    assert torch.equal(linear_weight(conv)[0], conv.weight.T) and torch.equal(linear_weight(linear)[1], linear.bias)
    assert linear_weight(layer_of((5, 3), bias=False))[1] is None


@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 64), (2, 1, 1, 64)], ids=str)
def test_any_batch_shape_goes_through(shape: tuple[int, ...]) -> None:
    layer = layer_of((64, 64))
    x = torch.randn(shape)
    for new in (int8_linear(layer, 0.0), nf4_linear(layer, 64, False), nf4_linear(layer, 128, False)):
        flat = run(new, x.reshape(-1, 64))
        assert torch.allclose(run(new, x), flat.reshape(*shape[:-1], 64), atol=1e-4)


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


@pytest.mark.parametrize("shape", [(256, 64), (256, 36)], ids=str)
def test_larger_blocks_and_double_scales_cost_accuracy_and_save_bytes(shape: tuple[int, int]) -> None:
    layer, x = layer_of(shape), rows(256, 64)
    exact = run(layer, x)

    def error_and_bytes(block: int, double: bool) -> tuple[float, int]:
        new = nf4_linear(layer, block, double)
        return float((run(new, x) - exact).norm() / exact.norm()), sum(storage_bytes(tensors_of([new])).values())

    small, large = error_and_bytes(64, False), error_and_bytes(1024, False)
    assert 0.05 < small[0] < large[0] < 0.2 and large[1] < small[1]
    int8 = float((run(int8_linear(layer, 0.0), x) - exact).norm() / exact.norm())
    assert 0.002 < int8 < 0.02 < small[0]


@known_bug("bitsandbytes turns fused weights back for state_dict() but not their scales: a row of several blocks gets them in another order")
def test_reading_the_state_dict_does_not_change_a_fused_nf4_layer() -> None:
    new, x = nf4_linear(layer_of((256, 32)), 64, False), rows(256)
    if not fused_nf4_runs(new, 64):
        pytest.xfail("the fused kernel does not run on this CPU")
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


@pytest.mark.parametrize("technique", [BnbInt8(), BnbInt8(threshold=0.0), BnbNf4(), BnbNf4(block_size=128), BnbNf4(double_quant=True)], ids=lambda t: t.spell())
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt_post_norm"])
def test_model_output_is_near_that_of_dequantised_weights(technique: BnbInt8 | BnbNf4, family: str, family_bundle: BundleOf) -> None:
    """The quantised model against the plain one with weights dequantised in numpy: what is left is rounding of activations."""
    bundle, twin = family_bundle(family), family_bundle(family)
    plain = contract.logits_of(bundle)
    for _, layer in quantisable_layers(twin.model):
        weight, _ = weight_and_bias(layer)
        if isinstance(technique, BnbNf4):
            weight = nf4_dequantised(weight, technique.block_size)
        else:
            scale = np.abs(weight).max(1, keepdims=True)
            weight = np.rint(weight / scale * 127) * scale / 127
        layer.weight.copy_(torch.from_numpy(weight.T if isinstance(layer, Conv1D) else weight))
    wanted = contract.logits_of(twin)
    with contract.apply(technique, bundle):
        got = contract.logits_of(bundle)
    error, moved = float((got - wanted).norm() / wanted.norm()), float((wanted - plain).norm() / plain.norm())
    assert moved > 0.005
    assert error < (0.03 if isinstance(technique, BnbInt8) else 0.25 * moved)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.5, 7), (1.0, 14), (0.25, 4), (0.95, 13)])
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


@known_bug("a share above 0 that rounds to no layer is on and does nothing")
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
    layers = [layer for _, layer in quantisable_layers(bundle.model)]
    elements = [layer.weight.numel() for layer in layers]
    outputs = [linear_weight(layer)[0].shape[0] for layer in layers]
    biases = sum(layer.bias.nbytes for layer in layers if layer.bias is not None)
    with contract.apply(BnbInt8(), bundle) as applied:
        assert applied.report.bytes_before == 4 * sum(elements) + biases
        assert applied.report.bytes_after == sum(elements) + 4 * sum(outputs) + biases
    with contract.apply(BnbNf4(), bundle) as applied:
        after = applied.report.bytes_after - biases
    codes = sum((n + 1) // 2 for n in elements)
    scales = sum(-(-n // 64) for n in elements)
    # Scales are bf16 where the fused kernel runs and fp32 elsewhere; each layer may hold its table of 16 values.
    assert codes + 2 * scales <= after <= codes + 4 * scales + 64 * len(layers)


class Ops(TorchDispatchMode):
    """Counts the bitsandbytes operators a forward really calls."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "bitsandbytes":
            self.names.append(func.name().split("::")[1].split(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt_post_norm"])
def test_nf4_label_is_what_the_forward_does(family: str, block: int, family_bundle: BundleOf) -> None:
    bundle = family_bundle(family)
    ids = torch.tensor([[5, 6, 7]])
    with contract.apply(BnbNf4(block_size=block), bundle) as applied, torch.inference_mode():
        with Ops() as ops:
            bundle.model(input_ids=ids, use_cache=False)
        layers = len(applied.packed)
        packed = ops.names.count("gemv_4bit")  # computes with the codes; the others unpack the layer first
        assert packed + ops.names.count("gemm_4bit") == layers
        assert applied.report.label is (Label.EXECUTED if packed == layers else Label.STORED)
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
