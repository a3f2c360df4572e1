"""The methods that a comparison offers, with what a person needs to choose among them."""

from __future__ import annotations

from dataclasses import dataclass

from engines.catalog import TECHNIQUES
from engines.combinations import offered_combinations
from engines.methods import BASELINE, method_names, parse_method


@dataclass(frozen=True)
class MethodInfo:
    """A method to offer. members: the techniques it stands for, in the order they are applied; none for the baseline."""

    name: str
    title: str
    summary: str
    members: tuple[str, ...]


def describe_methods() -> tuple[MethodInfo, ...]:
    """Baseline, every built technique, and the named combinations whose parts are built; on a model `all_combined` may have fewer members."""
    return tuple(_describe(name) for name in method_names())


def _describe(name: str) -> MethodInfo:
    if name == BASELINE:
        return MethodInfo(name, "Baseline", "The unmodified model in transformers, in the faster of fp32 and bf16.", ())
    about = TECHNIQUES.get(name) or offered_combinations()[name]
    return MethodInfo(name, about.title, about.summary, tuple(t.name for t in parse_method(name)))
