"""keep="drop": the originals really leave memory, answers stay, the baseline is not touched, undo reads the files again or is refused before."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from core.architectures import FAMILIES
from core.bundle import Bundle, ModelInfo, StorageWatch, storage_bytes, tensors_of
from core.decoding import decode_one_token, prefill
from core.errors import InvalidRequest, ModelLoadError, UnsupportedModel
from core.linear_layers import is_plain_linear
from core.loading import load_bundle
from core.memory import resident_bytes, return_freed_memory
from core.progress import Stop
from core.source_weights import SourceWeights
from engines.engine import Engine, fused_engine
from engines.methods import parse_method
from engines.native.release import RELEASED_NOTE
from engines.native.technique import NativeRuntime
from engines.pool import EnginePool
from kernels.build import native
from kernels.gemv import gemv
from kernels.packed_linear import PackedLinear
from kernels.packing import KINDS, TILE, pack, side_by_side, unpack
from tests import contract, families
from tests.tolerances import NATIVE

CheckpointOf = Callable[[str], Path]
DROP = NativeRuntime(keep="drop")
METHODS = ("native:keep=drop", "native:keep=drop+int8", "native:keep=drop+int4:group_size=32", "native:keep=drop+larosa:sparsity=0.4", "native:keep=drop+int8+larosa:sparsity=0.5",
           "native:keep=drop+larosa:sparsity=0.5,variant=topk")


@pytest.fixture(autouse=True)
def compiled() -> None:
    if native().library is None:
        pytest.skip(f"NOT RUN: {native().reason}")


def loaded(folder: Path) -> Bundle:
    return load_bundle(str(folder))


def answer(bundle: Bundle, steps: int = 24) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens and the prompt's logits."""
    ids = [int(i) for i in bundle.tokenizer(contract.PROMPT, add_special_tokens=False)["input_ids"]][:40]
    cache = bundle.cache_factory()
    logits = prefill(bundle, ids, cache, Stop())
    assert logits is not None
    first, tokens = logits.clone(), [int(logits.argmax())]
    for _ in range(steps):
        tokens.append(int(decode_one_token(bundle, tokens[-1], cache).argmax()))
    return tokens, first


def weights_in_memory(engine: Engine) -> int:
    return sum(engine.storages().values())


def released_bytes(engine: Engine) -> str:
    (note,) = (n for n in engine.reports[-1].notes if n.startswith(RELEASED_NOTE))
    return note


@pytest.mark.parametrize("beyond_cache", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"opt_post_norm"}))
def test_answers_are_those_of_kept_originals_and_no_original_is_left(family: str, method: str, beyond_cache: bool, family_checkpoint: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    if beyond_cache:
        monkeypatch.setattr("engines.native.compiler.last_level_cache_bytes", lambda: 0)
    kept = fused_engine(loaded(family_checkpoint(family)), parse_method(method.replace(":keep=drop", "")))
    base = loaded(family_checkpoint(family))
    table, head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    linear = [m for m in base.model.modules() if is_plain_linear(m) and m.weight is not table.weight]
    watch = StorageWatch(m.weight for m in linear)
    total = sum(m.weight.nbytes for m in linear)
    del linear, head, table
    engine = fused_engine(base, parse_method(method), in_place=True)
    assert watch.released_bytes() == total, f"{watch.alive()} of {total} bytes are held"
    tokens, logits = answer(engine.bundle)
    wanted_tokens, wanted_logits = answer(kept.bundle)
    assert NATIVE.holds(logits, wanted_logits)
    assert tokens == wanted_tokens
    assert weights_in_memory(engine) < weights_in_memory(kept)
    assert engine.weights.kept_for_undo == 0


@pytest.mark.parametrize("method", ["native:keep=drop", "native:keep=drop+int8", "native:keep=drop+larosa:sparsity=0.4"])
def test_nothing_is_stored_twice(method: str, family_checkpoint: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the torch layers read is what the program reads."""
    monkeypatch.setattr("engines.native.compiler.last_level_cache_bytes", lambda: 0)
    bundle = fused_engine(loaded(family_checkpoint("qwen2")), parse_method(method), in_place=True).bundle
    read = {p.weight.data.untyped_storage().data_ptr() for p in bundle.decoder.compiled.program.program.products}  # type: ignore[union-attr]
    layers = [m for m in bundle.model.modules() if isinstance(m, PackedLinear)]
    assert len(layers) == 15 and not any(is_plain_linear(m) for path, m in bundle.model.named_modules() if "adapter" not in path)
    assert {m.weight_data.untyped_storage().data_ptr() for m in layers} <= read


def test_the_report_says_how_much_was_released(family_checkpoint: CheckpointOf) -> None:
    base = loaded(family_checkpoint("mistral"))
    linear = sum(m.weight.nbytes for m in base.model.modules() if isinstance(m, nn.Linear))
    from core.units import format_bytes

    alone = fused_engine(base, [DROP], in_place=True)
    assert released_bytes(alone) == f"{RELEASED_NOTE} {format_bytes(linear)} of {format_bytes(linear)}"
    shared = loaded(family_checkpoint("mistral"))
    beside = fused_engine(shared, [DROP])
    assert released_bytes(beside).startswith(f"{RELEASED_NOTE} {format_bytes(0)} of {format_bytes(linear)}; {format_bytes(linear)} are held by another engine")


@pytest.mark.parametrize("method", ["native:keep=drop", "native:keep=drop+int8+larosa:sparsity=0.5"])
def test_a_baseline_in_the_same_process_is_not_damaged(method: str, family_checkpoint: CheckpointOf) -> None:
    base = loaded(family_checkpoint("llama"))
    contract.check_engine_leaves_base_alone(parse_method(method), base)


@pytest.mark.parametrize("drop_first", [True, False])
def test_the_pool_keeps_no_baseline_that_nobody_asked_for_and_gives_a_whole_one_later(drop_first: bool, family_checkpoint: CheckpointOf) -> None:
    pool, model = EnginePool(), str(family_checkpoint("qwen3"))
    wanted, _ = answer(loaded(family_checkpoint("qwen3")))
    order = [parse_method("native:keep=drop"), ()]
    engines = {bool(t): pool.get(model, t, dtype="float32") for t in (order if drop_first else order[::-1])}
    assert answer(engines[False].bundle)[0] == wanted == answer(engines[True].bundle)[0]
    assert not any(isinstance(m, PackedLinear) for m in engines[False].bundle.model.modules())
    assert ("are held by another engine" in released_bytes(engines[True])) is not drop_first


def test_pool_with_only_a_dropping_engine_holds_its_weights_once(family_checkpoint: CheckpointOf) -> None:
    pool, model = EnginePool(), str(family_checkpoint("qwen2"))
    pool.get(model, parse_method("native:keep=drop+int8"), dtype="float32")
    assert len(pool.keys()) == 1 and pool.holds(model, dtype="float32") is False
    dropped = pool.held_bytes()
    pool.unload()
    pool.get(model, parse_method("native+int8"), dtype="float32")
    assert dropped < 0.5 * pool.held_bytes()


# Outside of an engine: undo.


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_contract_of_undo_holds_while_somebody_else_holds_the_originals(family: str, family_bundle: Callable[[str], Bundle]) -> None:
    contract.check_undo_is_exact(DROP, family_bundle(family))
    contract.check_undo_after_exception(DROP, family_bundle(family))
    contract.check_prepare_leaves_no_trace(DROP, family_bundle(family))
    contract.check_report(DROP, family_bundle(family))
    contract.check_engine_leaves_base_alone([DROP], family_bundle(family))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_undo_reads_released_weights_from_the_files_bit_for_bit(family: str, dtype: str, family_checkpoint: CheckpointOf) -> None:
    bundle = load_bundle(str(family_checkpoint(family)), dtype=dtype)
    wanted = {name: p.detach().clone() for name, p in bundle.model.named_parameters(remove_duplicate=False)}
    modules = dict(bundle.model.named_modules())
    before = contract.logits_of(bundle)
    watch = StorageWatch(m.weight for m in bundle.model.modules() if is_plain_linear(m))
    applied = DROP.apply(bundle, DROP.prepare(bundle))
    gc.collect()
    in_use = storage_bytes(tensors_of([bundle.model]))
    assert watch.released_bytes() and set(watch.alive()) <= set(in_use), "only the embedding, which is the head too, is still there"
    for _ in range(2):
        applied.undo()
        now = dict(bundle.model.named_parameters(remove_duplicate=False))
        assert list(now) == list(wanted) and dict(bundle.model.named_modules()) == modules and bundle.decoder is None
        for name, tensor in wanted.items():
            assert now[name].dtype == tensor.dtype and torch.equal(now[name].view(torch.uint8), tensor.view(torch.uint8)), name
    # the same weights elsewhere in memory: torch's sums may round otherwise
    assert torch.allclose(contract.logits_of(bundle), before, rtol=0, atol=1e-5 if dtype == "float32" else 0.05)


def test_what_a_technique_made_is_kept_for_undo_and_said(family_checkpoint: CheckpointOf) -> None:
    bundle = loaded(family_checkpoint("qwen2"))
    (larosa,) = parse_method("larosa:sparsity=0.4")
    first = contract.apply(larosa, bundle)
    rotated, before = contract.logits_of(bundle), contract.snapshot(bundle)
    second = DROP.apply(bundle, DROP.prepare(bundle))
    assert any("stay for undo" in note for note in second.report.notes)
    second.undo()
    contract.assert_unchanged(before, bundle, "native undone")
    assert torch.equal(contract.logits_of(bundle), rotated)
    first.undo()


@pytest.mark.parametrize("change", ["rewritten", "gone"])
def test_undo_without_the_files_is_refused_and_leaves_a_working_model(change: str, family_checkpoint: CheckpointOf, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(family_checkpoint("qwen2"), folder)
    bundle = loaded(folder)
    applied = DROP.apply(bundle, DROP.prepare(bundle))
    tokens, _ = answer(bundle)
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    file.unlink()
    if change == "rewritten":
        file.write_bytes(content[:-4] + b"\0\0\0\0")
    with pytest.raises(ModelLoadError, match="what replaced them stays"):
        applied.undo()
    assert answer(bundle)[0] == tokens and bundle.decoder is not None


def test_a_model_without_files_is_refused_before_anything_is_changed(llama: Bundle) -> None:
    llama.info = ModelInfo("random weights", None, "float32", "local")
    before = contract.snapshot(llama)
    for use in (lambda: DROP.check(llama), lambda: DROP.apply(llama, DROP.prepare(llama)), lambda: fused_engine(llama, [DROP])):
        with pytest.raises(UnsupportedModel, match="keep=drop needs the files of random weights"):
            use()
    contract.assert_unchanged(before, llama, "refused")


def test_files_that_changed_since_loading_are_refused(family_checkpoint: CheckpointOf, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(family_checkpoint("qwen2"), folder)
    bundle = loaded(folder)
    (file,) = folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(UnsupportedModel, match="have changed since"):
        DROP.check(bundle)


def test_a_weight_that_differs_from_its_file_is_not_read_from_it(family_checkpoint: CheckpointOf) -> None:
    bundle = loaded(family_checkpoint("qwen2"))
    source = SourceWeights(bundle.info, "this test")
    name, parameter = "model.layers.0.mlp.up_proj.weight", bundle.model.get_parameter("model.layers.0.mlp.up_proj.weight")
    read = source.reader(name, parameter)
    assert read is not None and torch.equal(read(), parameter)
    parameter.data[0, 0] += 1
    assert source.reader(name, parameter) is None
    assert source.reader("model.nothing.weight", parameter) is None


def test_without_a_compiler_nothing_is_dropped(family_checkpoint: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FUSEBOX_NATIVE", "0")
    base = loaded(family_checkpoint("qwen2"))
    before = weights_in_memory(Engine(base))
    engine = fused_engine(base, [DROP], in_place=True)
    assert engine.bundle.decoder is None and weights_in_memory(engine) == before
    assert not any(n.startswith(RELEASED_NOTE) for n in engine.reports[-1].notes)


@pytest.fixture
def large(tmp_path: Path, tokenizer: object) -> Iterator[Path]:
    """A model whose linear layers are some 150 MB."""
    model = families.make_model("mistral", tokenizer, hidden_size=768, intermediate_size=3072, num_hidden_layers=4, num_attention_heads=12, num_key_value_heads=12)  # type: ignore[arg-type]
    model.save_pretrained(tmp_path / "large")
    tokenizer.save_pretrained(tmp_path / "large")  # type: ignore[attr-defined]
    yield tmp_path / "large"


@pytest.mark.parametrize("method", ["native:keep=drop", "native:keep=drop+int8"])
def test_resident_memory_falls_by_the_originals(method: str, large: Path) -> None:
    bundles, resident = {}, {}
    for name in (method.replace(":keep=drop", ""), method):
        gc.collect()
        return_freed_memory()
        begin = resident_bytes()
        base = load_bundle(str(large))
        originals = sum(m.weight.nbytes for m in base.model.modules() if isinstance(m, nn.Linear))
        bundles[name] = fused_engine(base, parse_method(name), in_place=True)
        answer(bundles[name].bundle, 4)
        del base
        gc.collect()
        return_freed_memory()
        resident[name] = resident_bytes() - begin
    kept, dropped = resident.values()
    assert originals > 140e6
    assert 0.9 * originals < kept - dropped < 1.1 * originals, f"{kept / 1e6:.0f} MB with, {dropped / 1e6:.0f} MB without {originals / 1e6:.0f} MB of originals"


# A part of a weight whose rows lie together, and prompts read from packed weights.


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_weights_side_by_side_is_the_weight_it_was(kind: str) -> None:
    weights = [torch.randn(size, 96) for size in (200, 128, 50)]
    packed = [pack(w, kind, 32) for w in weights]
    whole, start = side_by_side(packed), 0
    for one in packed:
        part = whole.part(start, one.out_features)
        assert part.data.untyped_storage().data_ptr() == whole.data.untyped_storage().data_ptr()
        assert torch.equal(unpack(part), unpack(one))
        vector, rows = torch.randn(96), torch.arange(0, 96, 3, dtype=torch.int32)
        assert torch.allclose(gemv(vector, part, None, rows), gemv(vector, one, None, rows), atol=1e-4)
        x = torch.randn(2, 5, 96)
        assert torch.allclose(PackedLinear(part, None)(x), PackedLinear(one, None)(x), atol=1e-5)
        start += -(-one.out_features // TILE) * TILE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unpacking_to_a_dtype_rounds_what_the_kernel_computes_with(kind: str, dtype: torch.dtype) -> None:
    packed = pack(torch.randn(150, 100), kind, 32)
    assert torch.equal(unpack(packed, dtype), unpack(packed).to(dtype)) and unpack(packed, dtype).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_prompts_read_from_packed_floats_are_those_of_the_layer(dtype: torch.dtype) -> None:
    """Sums in another order: float32's last bits, and bfloat16's last where a sum stands between two."""
    layer, x = nn.Linear(300, 200).to(dtype), torch.randn(1, 9, 300).to(dtype)
    packed = PackedLinear.in_place_of(layer, pack(layer.weight, str(dtype).removeprefix("torch.")))
    wanted = layer.double()(x.double())
    assert torch.allclose(packed(x).double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-5)


def test_options_are_checked_and_spelled() -> None:
    assert parse_method("native:keep=drop") == (DROP,) and DROP.spell() == "native:keep=drop" and NativeRuntime().spell() == "native"
    with pytest.raises(InvalidRequest, match="originals, drop"):
        NativeRuntime(keep="some")


@pytest.mark.parametrize("has_products", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_bfloat16_prompts_are_read_packed_where_the_cpu_has_no_such_products(family: str, has_products: bool, family_checkpoint: CheckpointOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.native.technique.multiplies_bf16", lambda device: has_products)
    bundle = load_bundle(str(family_checkpoint(family)), dtype="bfloat16")
    before = contract.snapshot(bundle)
    wanted = contract.logits_of(bundle)
    (native,) = parse_method("native")
    with contract.apply(native, bundle) as applied:
        packed = {path for path, module in bundle.model.named_modules() if isinstance(module, PackedLinear)}
        assert packed <= set(applied.report.touched)
        assert bool(packed) != has_products and (applied.report.bytes_before > 0) != has_products
        assert any("multiplied in C" in note for note in applied.report.notes) != has_products
        got = contract.logits_of(bundle)
        assert (got - wanted).abs().max() < 2e-2 * wanted.abs().max()
    contract.assert_unchanged(before, bundle, "after undo")
