"""What every technique promises, as functions that raise AssertionError when a promise is broken.

Each function takes a technique and a bundle it may work on. `test_contract.py` runs them over the catalog, over all pairs, and
over techniques broken on purpose, each of which must be caught.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.bundle import Bundle
from core.decoding import cache_argument
from core.errors import FuseboxError, IncompatibleTechniques, UnsupportedModel
from core.prepared_cache import cached_prepare
from core.reversible import Edits
from core.technique import Applied, Effect, Label, Prepared, Stage, Technique
from engines.engine import fused_engine
from kernels.kv_memory.cache import KVStats
from tests.tolerances import LOSSY_FLOOR, ROTATED

PROMPT = "Please tell me what a small language model really does with the words that somebody writes to it."
DECODED = 3  # last tokens of the prompt that go through the model one at a time, as in decode
SLOTS = ("model", "tokenizer", "prompt_filters", "cache_factory", "decoder")

_NOTHING = KVStats(0, 0, 0, 0, 0)
Counter = Callable[[Bundle], float]
COUNTERS: dict[str, Counter] = {"kv_reserved_bytes": lambda bundle: getattr(bundle.cache_factory(), "stats", lambda: _NOTHING)().reserved_bytes}
"""For lossless techniques: how to read `Technique.counter` off a bundle after one request. A new counter is added here."""


# What a bundle is, exactly.


@dataclass(frozen=True)
class Snapshot:
    """Everything a technique could change. Tensors are kept as references and as copies: neither may differ afterwards."""

    modules: dict[str, tuple[Any, ...]]
    tensors: dict[str, tuple[Tensor, Tensor]]
    slots: tuple[Any, ...]
    vocabulary: int
    config: dict[str, Any]


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
_PLAIN = (bool, int, float, str, bytes, type(None), torch.dtype)


def snapshot(bundle: Bundle) -> Snapshot:
    """The bundle as it is now."""
    model = bundle.model
    tensors = OrderedDict()
    for kind, named in (("parameter", model.named_parameters), ("buffer", model.named_buffers)):
        for name, tensor in named(remove_duplicate=False):
            tensors[f"{kind} {name}"] = (tensor, tensor.detach().clone())
    modules = {path: _module_state(module) for path, module in model.named_modules(remove_duplicate=False)}
    slots = tuple(getattr(bundle, slot) for slot in SLOTS)
    return Snapshot(modules, tensors, slots, len(bundle.tokenizer), model.config.to_dict())


@dataclass(frozen=True, eq=False)
class _Same:
    """Equal only to a reference to the very same object, which it keeps alive so that no other takes its address."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None  # type: ignore[assignment]


def _module_state(module: nn.Module) -> tuple[Any, ...]:
    plain = {name: (value if isinstance(value, _PLAIN) else _Same(value)) for name, value in vars(module).items()}
    hooks = [[_Same(hook) for hook in vars(module).get(table, {}).values()] for table in _HOOKS]
    children = [(name, _Same(child)) for name, child in module._modules.items()]
    return _Same(module), plain, hooks, children, list(module._parameters), list(module._buffers)


def assert_unchanged(before: Snapshot, bundle: Bundle, when: str) -> None:
    """Every module, hook, attribute, slot and bit is as in `before`."""
    now = snapshot(bundle)
    assert list(now.modules) == list(before.modules), f"{when}: the list of modules differs"
    for path, state in before.modules.items():
        assert now.modules[path] == state, f"{when}: module {path or 'model'!r} is not what it was"
    assert list(now.tensors) == list(before.tensors), f"{when}: the names of the weights differ"
    for name, (tensor, copy) in before.tensors.items():
        assert now.tensors[name][0] is tensor, f"{when}: {name} is another tensor"
        assert _same_bits(tensor, copy), f"{when}: the values of {name} changed"
    for slot, old, new in zip(SLOTS, before.slots, now.slots, strict=True):
        assert old is new, f"{when}: the slot {slot} was not put back"
    assert now.vocabulary == before.vocabulary, f"{when}: the tokenizer's vocabulary changed"
    assert now.config == before.config, f"{when}: the model's configuration changed"


def _same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


@torch.inference_mode()
def logits_of(bundle: Bundle, text: str = PROMPT) -> Tensor:
    """Logits of a text as a request would have them: filters, tokenizer, one prefill, then decode steps. [tokens, vocab_size]."""
    ids = torch.tensor([bundle.tokenizer(bundle.filter_prompt(text), add_special_tokens=False)["input_ids"]])
    cache = bundle.cache_factory()
    steps = [ids[:, :-DECODED], *ids[:, -DECODED:].split(1, dim=1)]
    return torch.cat([bundle.model(input_ids=step, **cache_argument(bundle.model, cache), use_cache=True).logits[0] for step in steps])


def weight_bytes_of(bundle: Bundle, paths: Sequence[str]) -> int:
    """Bytes behind the modules at `paths`, counted here without the product's own counting; shared storages once."""
    sizes: dict[int, int] = {}
    for path in paths:
        for module in bundle.model.get_submodule(path).modules():
            _collect(vars(module), sizes, set())
    return sum(sizes.values())


def _collect(value: Any, sizes: dict[int, int], seen: set[int]) -> None:
    if id(value) in seen or isinstance(value, nn.Module):
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        sizes[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
    if isinstance(value, dict):
        children: Iterator[Any] = iter(value.values())
    elif isinstance(value, (list, tuple)):
        children = iter(value)
    else:
        children = iter(vars(value).values() if type(value).__module__.startswith("bitsandbytes") else ())
    for child in children:
        _collect(child, sizes, seen)


# The promises.


def apply(technique: Technique, bundle: Bundle) -> Applied:
    """check, prepare, apply: what an engine does, the cache of what was prepared included."""
    technique.check(bundle)
    return technique.apply(bundle, cached_prepare(technique, bundle))


def check_neutral_is_identity(kind: type[Technique], bundle: Bundle) -> None:
    """The neutral setting leaves the logits as they are, bit for bit, or but for rounding where the technique says so."""
    neutral = kind.neutral()
    if neutral is None and kind.effect is Effect.LOSSLESS:
        return  # all of its settings leave the logits as they are, which check_effect_is_real looks at
    assert neutral is not None, f"{kind.name} has no neutral setting"
    before = logits_of(bundle)
    with neutral.apply(bundle, cached_prepare(neutral, bundle)) as applied:
        after = logits_of(bundle)
        if kind.neutral_is_rounded:
            moved = float((after - before).abs().max() / before.std())
            assert moved <= ROTATED[bundle.model.dtype], f"{kind.name} at its neutral setting moves the logits by {moved:.1e} of their spread"
            return
        assert before.shape == after.shape and torch.equal(before, after), f"{kind.name} at its neutral setting changes the logits"
        assert applied.report.bytes_after <= applied.report.bytes_before, f"{kind.name} at its neutral setting claims or costs bytes"


def check_effect_is_real(technique: Technique, bundle: Bundle, counters: dict[str, Counter] | None = None) -> None:
    """A lossy technique changes the logits end to end; a lossless one leaves them equal and changes its declared counter."""
    counters = COUNTERS if counters is None else counters
    before = logits_of(bundle)
    if technique.effect is Effect.LOSSY:
        with apply(technique, bundle):
            after = logits_of(bundle)
        if before.shape == after.shape:
            moved = float((after - before).abs().max() / before.std())
            assert moved > LOSSY_FLOOR, f"{technique.name} is on and changes nothing: logits moved by {moved:.1e} of their spread"
        assert after.isfinite().all(), f"{technique.name} gives logits that are not finite"
        return
    assert technique.counter in counters, f"{technique.name} declares the counter {technique.counter!r}, which contract.COUNTERS cannot read"
    read = counters[technique.counter]
    counted_before = read(bundle)
    with apply(technique, bundle):
        after, counted_after = logits_of(bundle), read(bundle)
    assert before.shape == after.shape and torch.equal(before, after), f"{technique.name} is called lossless and changes the logits"
    assert counted_after != counted_before, f"{technique.name} is on and its counter {technique.counter} stays at {counted_before}"


def check_undo_is_exact(technique: Technique, bundle: Bundle) -> None:
    """undo() puts everything back, again is harmless, and the end of a with block undoes too, also on an error."""
    before_logits = logits_of(bundle)
    before = snapshot(bundle)
    applied = apply(technique, bundle)
    logits_of(bundle)  # using it may make lazy state
    for time in ("first", "second"):
        applied.undo()
        assert_unchanged(before, bundle, f"{technique.name}, {time} undo")
    assert torch.equal(logits_of(bundle), before_logits), f"{technique.name}: undo does not bring the logits back"
    try:
        with apply(technique, bundle):
            raise _Boom
    except _Boom:
        pass
    assert_unchanged(before, bundle, f"{technique.name}, with block left by an error")


def check_undo_after_exception(technique: Technique, bundle: Bundle) -> None:
    """apply() that fails at any of its edits, before or after making it, leaves the bundle as found."""
    technique.check(bundle)
    prepared = technique.prepare(bundle)
    logits_of(bundle)
    before = snapshot(bundle)
    with _counting_edits() as made:
        technique.apply(bundle, prepared).undo()
    assert made.count, f"{technique.name} changes nothing through core.reversible"
    for place in sorted({1, (made.count + 1) // 2, made.count}):
        for late in (False, True):
            with _failing_edit(place, late):
                try:
                    technique.apply(bundle, prepared)
                except _Boom:
                    pass
                else:
                    raise AssertionError(f"{technique.name} swallows an error inside apply")
            assert_unchanged(before, bundle, f"{technique.name}, error at edit {place} of {made.count}")


def check_prepare_leaves_no_trace(technique: Technique, bundle: Bundle) -> None:
    """check() and prepare() read; they change no module, weight, hook or slot."""
    before_logits = logits_of(bundle)
    before = snapshot(bundle)
    technique.check(bundle)
    technique.prepare(bundle)
    assert_unchanged(before, bundle, f"{technique.name}, prepare")
    assert torch.equal(logits_of(bundle), before_logits)


def check_report(technique: Technique, bundle: Bundle) -> None:
    """The report names what was changed, no more and no less; weight techniques give true byte counts, smaller after than before."""
    before = snapshot(bundle)
    with apply(technique, bundle) as applied:
        report, after = applied.report, snapshot(bundle)
        assert report.technique == technique.name
        assert isinstance(report.label, Label)
        assert report.touched, f"{technique.name} changed something and reports nothing touched"
        changed = _changed(before, after)
        for path in changed:
            assert any(_covers(touched, path) for touched in report.touched), f"{technique.name} changed {path} and does not report it"
        for touched in report.touched:
            assert any(_covers(touched, path) for path in changed), f"{technique.name} reports {touched}, which it did not change"
            assert touched not in report.skipped, f"{touched} is reported as touched and as skipped"
        assert all(report.skipped.values()), f"{technique.name} skips without a reason"
        if technique.stage in (Stage.WEIGHTS, Stage.PACKING):
            assert report.bytes_after < report.bytes_before, f"{technique.name}: {report.bytes_before} -> {report.bytes_after} bytes"
            assert report.bytes_after == weight_bytes_of(bundle, report.touched), f"{technique.name} misreports bytes_after"
            applied.undo()
            assert report.bytes_before == weight_bytes_of(bundle, report.touched), f"{technique.name} misreports bytes_before"


def _changed(before: Snapshot, after: Snapshot) -> list[str]:
    """Slots and deepest module paths that differ between two snapshots."""
    slots = [slot for slot, a, b in zip(SLOTS, before.slots, after.slots, strict=True) if a is not b]
    paths = set(before.modules) | set(after.modules)
    different = {path for path in paths if before.modules.get(path) != after.modules.get(path)}
    for name in set(before.tensors) | set(after.tensors):
        if (one := before.tensors.get(name)) is None or (two := after.tensors.get(name)) is None or one[0] is not two[0] or not _same_bits(one[1], two[1]):
            different.add(name.split(" ", 1)[1].rpartition(".")[0])
    # A parent whose child was replaced differs only because of that child.
    own = [p for p in different if not any(q != p and (q.startswith(p + ".") or p == "") for q in different)]
    return slots + sorted(own)


def _covers(touched: str, path: str) -> bool:
    return path == touched or path.startswith(touched + ".")


def check_unsupported_is_left_alone(technique: Technique, bundle: Bundle) -> None:
    """A bundle that check() refuses is as it was, and the refusal is UnsupportedModel with a reason; else apply works and undoes."""
    before = snapshot(bundle)
    try:
        technique.check(bundle)
    except UnsupportedModel as refusal:
        named = technique.name in str(refusal) or technique.title in str(refusal)
        assert named and len(str(refusal)) > len(technique.title) + 10, "the refusal gives no reason"
        assert_unchanged(before, bundle, f"{technique.name}, refused")
        return
    with apply(technique, bundle) as applied:
        assert applied.report.touched, f"{technique.name} admits a model, then changes nothing in it"
    assert_unchanged(before, bundle, f"{technique.name}, undone")


def check_engine_leaves_base_alone(techniques: Sequence[Technique], base: Bundle) -> None:
    """An engine of techniques shares the base's tensors, and the base is not changed by it."""
    before_logits = logits_of(base)
    before = snapshot(base)
    engine = fused_engine(base, techniques)
    assert_unchanged(before, base, "engine built")
    logits_of(engine.bundle)
    assert_unchanged(before, base, "engine used")
    assert torch.equal(logits_of(base), before_logits)
    of_base = {tensor.untyped_storage().data_ptr() for tensor, _ in before.tensors.values()}
    touched = tuple(t for report in engine.reports for t in report.touched)
    for name, tensor in engine.bundle.model.named_parameters():
        if not any(_covers(t, name) for t in touched):
            assert tensor.untyped_storage().data_ptr() in of_base, f"{name} was copied, though no technique touched it"
    assert engine.bundle.model is not base.model


def check_prepared_survives_saving(technique: Technique, bundle: Bundle, folder: Path) -> None:
    """What prepare found out gives the same logits after a trip through a safetensors file."""
    prepared = technique.prepare(bundle)
    path = folder / f"{technique.name}.safetensors"
    Prepared(prepared.tensors, {"technique": technique.name, **prepared.meta}).save(path)
    stored = Prepared.load(path)
    loaded = Prepared(stored.tensors, {key: value for key, value in stored.meta.items() if key != "technique"})
    with technique.apply(bundle, prepared):
        direct = logits_of(bundle)
    with technique.apply(bundle, loaded):
        assert torch.equal(logits_of(bundle), direct), f"{technique.name}: a saved Prepared gives other logits"


def check_pair(first: Technique, second: Technique, bundle: Bundle) -> None:
    """Two techniques that go together both work when applied in this order, and undo in reverse is exact."""
    alone = {}
    for technique in (first, second):
        with apply(technique, bundle):
            alone[technique.name] = logits_of(bundle)
    before_logits = logits_of(bundle)
    before = snapshot(bundle)
    one = apply(first, bundle)
    between = snapshot(bundle)
    two = apply(second, bundle)
    both = logits_of(bundle)
    for technique in (first, second):
        if technique.effect is Effect.LOSSY:
            other = second if technique is first else first
            reference = alone[other.name]
            differs = both.shape != reference.shape or not torch.equal(both, reference)
            assert differs, f"{technique.name} does nothing once {other.name} is on"
    two.undo()
    assert_unchanged(between, bundle, f"{first.name} then {second.name}: the second undone")
    one.undo()
    assert_unchanged(before, bundle, f"{first.name} then {second.name}: both undone")
    assert torch.equal(logits_of(bundle), before_logits)


def check_incompatible(techniques: Sequence[Technique], base: Bundle, reason: str) -> None:
    """Techniques that exclude each other are refused with the reason, before anything is changed."""
    before = snapshot(base)
    try:
        fused_engine(base, techniques)
    except IncompatibleTechniques as refusal:
        assert reason in str(refusal), f"the refusal does not say why: {refusal}"
        assert all(t.name in str(refusal) for t in techniques), f"the refusal does not name both: {refusal}"
    else:
        raise AssertionError(f"{' and '.join(t.name for t in techniques)} are listed as incompatible and were applied together")
    assert_unchanged(before, base, "refused pair")


# Errors on demand.


class _Boom(FuseboxError):
    """Raised in the middle of apply."""


@dataclass
class _Made:
    count: int = 0


_EDITS = ("swap_module", "add_hook", "set_attr")


@contextmanager
def _patched_edits(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    real = {name: getattr(Edits, name) for name in _EDITS}
    try:
        for name, function in real.items():
            setattr(Edits, name, wrap(function))
        yield
    finally:
        for name, function in real.items():
            setattr(Edits, name, function)


@contextmanager
def _counting_edits() -> Iterator[_Made]:
    made = _Made()

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            made.count += 1
            return function(*args, **kwargs)

        return counted

    with _patched_edits(wrap):
        yield made


@contextmanager
def _failing_edit(place: int, late: bool) -> Iterator[None]:
    """The `place`-th edit raises, after it was made when `late`."""
    made = _Made()

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def failing(*args: Any, **kwargs: Any) -> Any:
            made.count += 1
            if made.count == place and not late:
                raise _Boom
            result = function(*args, **kwargs)
            if made.count == place:
                raise _Boom
            return result

        return failing

    with _patched_edits(wrap):
        yield
