"""The one abstraction: a technique is a frozen configuration that changes a bundle and can be undone exactly."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from enum import Enum, IntEnum
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from core.architectures import refusal
from core.bundle import Bundle
from core.errors import CalibrationError, InvalidRequest, UnsupportedModel
from core.files import replacing
from core.progress import Progress, silent
from core.reversible import Edits

_MARK = "fusebox"  # a safetensors file needs a tensor or an entry to be readable


class Effect(Enum):
    """LOSSLESS techniques leave the logits equal and change a declared counter; LOSSY ones change the logits."""

    LOSSLESS = "lossless"
    LOSSY = "lossy"


class Stage(IntEnum):
    """Where in a request a technique acts; techniques are applied in this order."""

    PROMPT = 0
    VOCAB = 1
    HEADS = 2
    WEIGHTS = 3
    ACTIVATIONS = 4
    PACKING = 5
    CACHE = 6
    STORE = 7
    RUNTIME = 8


SIMULATED_NOTE = "simulated:"
"""Notes that begin so hold only as long as no runtime executes the technique."""


class Label(Enum):
    """How real the saving is: only computed as if, held smaller in memory, or the smaller form is what runs."""

    SIMULATED = "simulated"
    STORED = "stored"
    EXECUTED = "executed"


def option(default: Any, help: str, *, minimum: float | None = None, maximum: float | None = None,
           step: float | None = None, choices: tuple[Any, ...] | None = None, neutral: Any = MISSING) -> Any:
    """A configuration field whose metadata builds the form, the CLI flags and the docs.

    neutral: the value at which the technique changes nothing; at most one field of a technique has one.
    """
    return field(default=default, metadata={"help": help, "minimum": minimum, "maximum": maximum, "step": step,
                                            "choices": choices, "neutral": neutral})


@dataclass(frozen=True)
class Prepared:
    """What the slow part of a technique found out, kept as tensors so that it is saved as safetensors."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write as safetensors, `meta` in the header; the old file stays whole until the new one is."""
        with replacing(path) as fresh:
            save_file({name: t.contiguous() for name, t in self.tensors.items()}, fresh, metadata={_MARK: "1", **self.meta})

    @classmethod
    def load(cls, path: Path) -> Prepared:
        """Read what `save` wrote.

        Raises:
            CalibrationError: the file is missing, cut or broken.
        """
        try:
            with safe_open(path, framework="pt") as file:
                meta = {k: v for k, v in (file.metadata() or {}).items() if k != _MARK}
                return cls({name: file.get_tensor(name) for name in file.keys()}, meta)  # noqa: SIM118 (not a mapping)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{path.name} cannot be read ({error}). Delete it; it is made again.") from error


@dataclass(frozen=True)
class Report:
    """What applying a technique really changed.

    touched: dotted module paths, or bundle slots. skipped: path -> reason.
    bytes_before, bytes_after: weight bytes of the touched modules.
    """

    technique: str
    label: Label
    touched: tuple[str, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    notes: tuple[str, ...] = ()


    def executed(self, note: str) -> Report:
        """The same change, now that a runtime makes use of it; `note` stands in place of what was said of a simulation."""
        return replace(self, label=Label.EXECUTED, notes=(*(n for n in self.notes if not n.startswith(SIMULATED_NOTE)), note))


class Applied:
    """A technique in effect. Undone by `undo()` or at the end of a `with` block; again is harmless."""

    def __init__(self, report: Report, edits: Edits, packed: tuple[nn.Module, ...] = ()) -> None:
        self.report = report
        self.edits = edits
        self.packed = packed

    def undo(self) -> None:
        """Put back what was there, bit for bit."""
        self.edits.undo()
        self.packed = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.undo()


@dataclass(frozen=True)
class Technique:
    """Base of all techniques. The instance is its configuration; subclasses are frozen dataclasses of `option`s."""

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    effect: ClassVar[Effect]
    stage: ClassVar[Stage]
    counter: ClassVar[str | None] = None
    """For lossless techniques: the metric that changes."""
    neutral_is_rounded: ClassVar[bool] = False
    """True where the neutral setting equals the model but for rounding, since it writes the weights in another basis."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not isinstance(value, bool) and isinstance(value, (int, float)):  # forms send 4.0 for 4; one configuration, one spelling
                object.__setattr__(self, item.name, _as_spelled(value, item.default))
            _check_value(self.name, item.name, getattr(self, item.name), item.metadata, item.default)

    @property
    def drops_originals(self) -> bool:
        """Whether the weights that this technique replaces, and those that the ones before it did, shall leave memory."""
        return False

    def check(self, bundle: Bundle) -> None:
        """Refuse a bundle this technique does not admit. Reads configurations only, so it takes milliseconds.

        Raises:
            UnsupportedModel: with the reason.
        """
        reason = refusal(bundle.model, self.name)
        if reason:
            raise UnsupportedModel(f"{self.title} does not admit {bundle.info.model_id}: {reason}.")

    def prepare(self, bundle: Bundle, data: Any = None, progress: Progress = silent) -> Prepared:
        """The slow part: calibrate, cluster, train. Never changes the bundle."""
        return Prepared()

    def apply(self, bundle: Bundle, prepared: Prepared) -> Applied:
        """Change the bundle in place and say what was changed. On an error the bundle is left as found."""
        edits = Edits()
        try:
            report, packed = self._apply(bundle, prepared, edits)
        except BaseException:
            edits.undo()
            raise
        return Applied(report, edits, packed)

    def _apply(self, bundle: Bundle, prepared: Prepared, edits: Edits) -> tuple[Report, tuple[nn.Module, ...]]:
        """The change itself, made through `edits` only; returns the report and the modules that hold packed weights."""
        raise NotImplementedError

    @classmethod
    def neutral(cls) -> Self | None:
        """The configuration that changes nothing, or None when there is none."""
        values = {f.name: f.metadata["neutral"] for f in fields(cls) if f.metadata["neutral"] is not MISSING}
        return cls(**values) if values else None

    def prepare_settings(self) -> dict[str, Any]:
        """The options that `prepare` depends on; what it found is kept under these."""
        return self.settings()

    def settings(self) -> dict[str, Any]:
        """The options as plain values, for recipes, keys and commands."""
        return asdict(self)

    def spell(self) -> str:
        """The text that `engines.methods` reads back: name, then the options that differ from their default."""
        changed = [f"{f.name}={getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name) != f.default]
        return self.name + (":" + ",".join(changed) if changed else "")


def _as_spelled(value: float, default: Any) -> float:
    """A number in the type of its option's default, where that loses nothing; no negative zero."""
    if isinstance(default, float) and abs(value) < 2**53:
        return float(value) + 0.0
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole and isinstance(default, int) and not isinstance(default, bool) else value


def _check_value(technique: str, name: str, value: Any, meta: Mapping[str, Any], default: Any) -> None:
    """One option against its metadata; the message names the option, the value and what is allowed."""
    choices, low, high = meta["choices"], meta["minimum"], meta["maximum"]
    where = f"{technique}: {name} is {value!r}"
    if choices is not None:
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            raise InvalidRequest(f"{where}; choose one of {', '.join(map(str, choices))}.")
        return
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise InvalidRequest(f"{where}; it is a switch, true or false.")
        return
    if isinstance(default, (int, float)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:  # noqa: PLR0124 (NaN)
            raise InvalidRequest(f"{where}; it must be a finite number.")
        if (low is not None and value < low) or (high is not None and value > high):
            raise InvalidRequest(f"{where}; it must lie between {low} and {high}.")
        if isinstance(value, float) and math.isinf(value):
            raise InvalidRequest(f"{where}; it must be a finite number.")
        if isinstance(default, int) and not isinstance(value, int):
            raise InvalidRequest(f"{where}; it must be a whole number.")
