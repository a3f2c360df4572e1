"""Named combinations of techniques, as data; each is offered once all its parts are built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from core.bundle import Bundle
from core.compatibility import ordered
from core.errors import IncompatibleTechniques, UnsupportedModel
from core.technique import Technique
from engines.catalog import TECHNIQUES


@dataclass(frozen=True)
class Combination:
    """A name for several techniques. parts: their names; None stands for all that go together."""

    name: str
    title: str
    summary: str
    parts: tuple[str, ...] | None


ALL_COMBINED = "all_combined"
COMBINATIONS = (
    Combination("hybrid_kv_cache", "Hybrid KV cache", "vAttention's pages, prefixes loaded or computed, and cascading eviction.", ("vattention", "cake_loader", "cake_eviction")),
    Combination(ALL_COMBINED, "All combined", "Every technique that the model and the others admit; what is left out is listed with the reason.", None),
)

PREFERRED = ("native", "larosa", "int8")
"""Where techniques exclude each other, these come first, then the catalog's order. native executes what others simulate or store; larosa
and int8 are the forms of sparse and of packed weights that it executes, int8 because its answers stay nearest to the baseline's."""


@dataclass(frozen=True)
class Members:
    """What a method stands for on one model. excluded: technique -> why it was left out."""

    techniques: tuple[Technique, ...]
    excluded: Mapping[str, str] = field(default_factory=dict)


def offered_combinations() -> dict[str, Combination]:
    """Those whose parts are all in the catalog, by name."""
    return {c.name: c for c in COMBINATIONS if c.parts is None or set(c.parts) <= set(TECHNIQUES)}


def all_combined(bundle: Bundle | None = None) -> Members:
    """Walk the techniques in the order of preference and keep each that the model and those before it admit.

    Args:
        bundle: the unmodified model; without one only the techniques' own compatibility counts.
    """
    chosen: list[Technique] = []
    excluded: dict[str, str] = {}
    for name in dict.fromkeys((*(n for n in PREFERRED if n in TECHNIQUES), *TECHNIQUES)):
        candidate = TECHNIQUES[name]()
        try:
            ordered([*chosen, candidate])
            if bundle is not None:
                candidate.check(bundle)
        except (IncompatibleTechniques, UnsupportedModel) as reason:
            excluded[name] = str(reason)
        else:
            chosen.append(candidate)
    return Members(ordered(chosen), excluded)
