"""Techniques that keep the contract, and techniques that break one promise each. The contract's functions must tell them apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from core.bundle import Bundle
from core.progress import Progress, silent
from core.reversible import Edits
from core.technique import Applied, Effect, Label, Prepared, Report, Stage, Technique, option

NORM = "model.norm"  # of the Llama shape, whose bundle all of these work on


class Scaled(nn.Module):
    """A module with its output multiplied."""

    def __init__(self, inner: nn.Module, factor: float) -> None:
        super().__init__()
        self.inner = inner
        self.factor = factor

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.inner(*args, **kwargs) * self.factor


@dataclass(frozen=True)
class Sound(Technique):
    """Keeps every promise: scales the last norm's output through a swapped module, a hook and an attribute."""

    name: ClassVar[str] = "sound"
    title: ClassVar[str] = "Sound"
    summary: ClassVar[str] = "Scales the last norm."
    effect: ClassVar[Effect] = Effect.LOSSY
    stage: ClassVar[Stage] = Stage.HEADS

    factor: float = option(1.5, "Factor", minimum=1.0, maximum=2.0, neutral=1.0)

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        if self.factor != 1.0:
            norm = bundle.model.get_submodule(NORM)
            edits.add_hook(norm.register_forward_hook, lambda module, args, output: output)
            edits.set_attr(norm, "fusebox_note", "scaled")
            edits.swap_module(bundle.model, NORM, Scaled(norm, self.factor))
        return Report(self.name, Label.EXECUTED, (NORM,) if self.factor != 1.0 else ()), ()


@dataclass(frozen=True)
class DoesNothing(Sound):
    """Lossy by name, reports work, changes no logit."""

    name: ClassVar[str] = "does_nothing"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        edits.swap_module(bundle.model, NORM, Scaled(bundle.model.get_submodule(NORM), 1.0))
        return Report(self.name, Label.EXECUTED, (NORM,)), ()


class _UndoneByDivision(Edits):
    def __init__(self, weight: Tensor, factor: float) -> None:
        super().__init__()
        self.weight, self.factor = weight, factor

    def undo(self) -> None:
        self.weight.data.div_(self.factor)
        self.factor = 1.0


@dataclass(frozen=True)
class UndoByDivision(Sound):
    """Multiplies a weight in place and divides it on undo: off by rounding."""

    name: ClassVar[str] = "undo_by_division"

    def apply(self, bundle: Bundle, prepared: Prepared) -> Applied:
        weight = bundle.model.get_submodule(NORM).weight
        weight.data.mul_(1.1)
        return Applied(Report(self.name, Label.EXECUTED, (NORM,)), _UndoneByDivision(weight, 1.1))


@dataclass(frozen=True)
class UndoForgetsHook(Sound):
    """Registers a hook beside `edits`, so undo leaves it."""

    name: ClassVar[str] = "undo_forgets_hook"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        bundle.model.get_submodule(NORM).register_forward_hook(lambda module, args, output: output * 1.5)
        return super()._apply(bundle, prepared, edits)


@dataclass(frozen=True)
class UndoTwiceBreaks(Sound):
    """undo() toggles: the second call applies again."""

    name: ClassVar[str] = "undo_twice_breaks"

    def apply(self, bundle: Bundle, prepared: Prepared) -> Applied:
        edits, holder = Edits(), bundle.model.get_submodule(NORM.rpartition(".")[0])
        plain = bundle.model.get_submodule(NORM)
        scaled = Scaled(plain, self.factor)

        def toggle() -> None:
            holder._modules["norm"] = plain if holder._modules["norm"] is scaled else scaled

        toggle()
        edits.undo = toggle  # type: ignore[method-assign]
        return Applied(Report(self.name, Label.EXECUTED, (NORM,)), edits)


@dataclass(frozen=True)
class NotNeutral(Sound):
    """Its neutral setting scales by one thousandth."""

    name: ClassVar[str] = "not_neutral"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        edits.swap_module(bundle.model, NORM, Scaled(bundle.model.get_submodule(NORM), self.factor + 1e-3))
        return Report(self.name, Label.EXECUTED, (NORM,)), ()


@dataclass(frozen=True)
class NoNeutral(Sound):
    """Has no setting that changes nothing."""

    name: ClassVar[str] = "no_neutral"

    factor: float = option(1.5, "Factor", minimum=1.0, maximum=2.0)


@dataclass(frozen=True)
class MutatesInPrepare(Sound):
    """Calibrates on the model's own weights, in place."""

    name: ClassVar[str] = "mutates_in_prepare"

    def prepare(self, bundle: Bundle, data: Any = None, progress: Progress = silent) -> Prepared:
        bundle.model.get_submodule(NORM).weight.data.add_(1e-7)
        return Prepared()


@dataclass(frozen=True)
class HooksInPrepare(Sound):
    """Leaves a calibration hook behind that changes no logit."""

    name: ClassVar[str] = "hooks_in_prepare"

    def prepare(self, bundle: Bundle, data: Any = None, progress: Progress = silent) -> Prepared:
        bundle.model.get_submodule(NORM).register_forward_hook(lambda module, args, output: None)
        return Prepared()


@dataclass(frozen=True)
class ResidueOnError(Sound):
    """Sets a flag on the model by hand before its edits; only a finished apply takes it off again."""

    name: ClassVar[str] = "residue_on_error"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        bundle.model.get_submodule(NORM).busy = True
        result = super()._apply(bundle, prepared, edits)
        del bundle.model.get_submodule(NORM).inner.busy
        return result


@dataclass(frozen=True)
class SwallowsErrors(Sound):
    """Reports success whatever happens inside apply."""

    name: ClassVar[str] = "swallows_errors"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        try:
            return super()._apply(bundle, prepared, edits)
        except Exception:
            edits.undo()
            return Report(self.name, Label.EXECUTED, (NORM,)), ()


@dataclass(frozen=True)
class ReportsNothing(Sound):
    """Changes a module and says it touched none."""

    name: ClassVar[str] = "reports_nothing"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        super()._apply(bundle, prepared, edits)
        return Report(self.name, Label.EXECUTED, ()), ()


@dataclass(frozen=True)
class ReportsTooMuch(Sound):
    """Says it touched a layer it left alone."""

    name: ClassVar[str] = "reports_too_much"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        super()._apply(bundle, prepared, edits)
        return Report(self.name, Label.EXECUTED, (NORM, "model.layers.0.mlp")), ()


@dataclass(frozen=True)
class ReportsTooLittle(Sound):
    """Changes two things and reports one."""

    name: ClassVar[str] = "reports_too_little"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        edits.set_attr(bundle.model.get_submodule("model.layers.0.self_attn"), "scaling", 0.0)
        return super()._apply(bundle, prepared, edits)


class _Half(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.weight.detach().to(torch.float16), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


@dataclass(frozen=True)
class BytesLie(Sound):
    """Stores a layer in half the bytes and claims a tenth."""

    name: ClassVar[str] = "bytes_lie"
    stage: ClassVar[Stage] = Stage.WEIGHTS

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        path = "model.layers.0.mlp.down_proj"
        old = bundle.model.get_submodule(path)
        new = _Half(old)
        edits.swap_module(bundle.model, path, new)
        return Report(self.name, Label.STORED, (path,), bytes_before=old.weight.nbytes, bytes_after=old.weight.nbytes // 10), (new,)


@dataclass(frozen=True)
class SavesNoBytes(BytesLie):
    """A weight technique that stores as much as before."""

    name: ClassVar[str] = "saves_no_bytes"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        path = "model.layers.0.mlp.down_proj"
        old = bundle.model.get_submodule(path)
        edits.swap_module(bundle.model, path, Scaled(old, 2.0))
        return Report(self.name, Label.STORED, (path,), bytes_before=old.weight.nbytes, bytes_after=old.weight.nbytes), ()


@dataclass(frozen=True)
class RefusesTooLate(Sound):
    """check() edits the model before it refuses."""

    name: ClassVar[str] = "refuses_too_late"

    def check(self, bundle: Bundle) -> None:
        from core.errors import UnsupportedModel

        bundle.model.config.use_cache = not bundle.model.config.use_cache
        raise UnsupportedModel(f"{self.name}: this model has no part that could be scaled.")


@dataclass(frozen=True)
class ChangesSharedWeights(Sound):
    """Writes into a weight that the engine shares with its base."""

    name: ClassVar[str] = "changes_shared_weights"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        bundle.model.get_submodule(NORM).weight.data.mul_(1.25)
        return super()._apply(bundle, prepared, edits)


@dataclass(frozen=True)
class CopiesWeights(Sound):
    """Gives the engine its own copy of a weight that nobody changes."""

    name: ClassVar[str] = "copies_weights"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        layer = bundle.model.get_submodule("model.layers.0.mlp.down_proj")
        edits.set_attr(layer, "weight", nn.Parameter(layer.weight.detach().clone(), requires_grad=False))
        return super()._apply(bundle, prepared, edits)


@dataclass(frozen=True)
class ForgetsPrepared(Sound):
    """Its calibration lives in a plain attribute beside `Prepared`, so a saved file lacks it."""

    name: ClassVar[str] = "forgets_prepared"
    _kept: ClassVar[dict[int, float]] = {}

    def prepare(self, bundle: Bundle, data: Any = None, progress: Progress = silent) -> Prepared:
        prepared = Prepared()
        self._kept[id(prepared)] = 1.75
        return prepared

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        factor = self._kept.get(id(prepared), self.factor)
        edits.swap_module(bundle.model, NORM, Scaled(bundle.model.get_submodule(NORM), factor))
        return Report(self.name, Label.EXECUTED, (NORM,)), ()


class CountedCache(DynamicCache):
    """A cache that counts how many were made."""

    made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        CountedCache.made += 1


@dataclass(frozen=True)
class Lossless(Sound):
    """Keeps the promises of a lossless technique: the same logits from another cache, which counts."""

    name: ClassVar[str] = "lossless"
    effect: ClassVar[Effect] = Effect.LOSSLESS
    stage: ClassVar[Stage] = Stage.CACHE
    counter: ClassVar[str | None] = "caches_made"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        edits.set_attr(bundle, "cache_factory", CountedCache)
        return Report(self.name, Label.EXECUTED, ("cache_factory",)), ()


@dataclass(frozen=True)
class LosslessThatLoses(Lossless):
    """Called lossless, and scales the last norm."""

    name: ClassVar[str] = "lossless_that_loses"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        edits.swap_module(bundle.model, NORM, Scaled(bundle.model.get_submodule(NORM), self.factor))
        return super()._apply(bundle, prepared, edits)


@dataclass(frozen=True)
class LosslessThatIdles(Lossless):
    """Called lossless, and does nothing at all."""

    name: ClassVar[str] = "lossless_that_idles"

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        edits.set_attr(bundle, "cache_factory", DynamicCache)
        return Report(self.name, Label.EXECUTED, ("cache_factory",)), ()
