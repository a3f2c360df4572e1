"""Which techniques go together: order by stage, and one table of pairs that exclude each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from core.errors import IncompatibleTechniques
from core.technique import Technique

# Pairs of technique names that cannot be on at once, with the reason a person reads.
EXCLUDES: dict[frozenset[str], str] = {
    frozenset({"bnb_int8", "bnb_nf4"}): "both replace the same linear layers; a weight is stored as int8 or as nf4, not as both",
    frozenset({"larosa", "bnb_int8"}): "a rotation is written into full-precision weights, and bitsandbytes has packed them before",
    frozenset({"larosa", "bnb_nf4"}): "a rotation is written into full-precision weights, and bitsandbytes has packed them before",
    **{
        frozenset({ours, theirs}): "both replace the same linear layers; a weight is stored in one form"
        for ours, theirs in (("int8", "int4"), ("int8", "bnb_int8"), ("int8", "bnb_nf4"), ("int4", "bnb_int8"), ("int4", "bnb_nf4"))
    },
}

ORDERED: dict[frozenset[str], str] = {
    frozenset({"larosa", "int8"}): "a rotation is written into full-precision weights, which are packed after it",
    frozenset({"larosa", "int4"}): "a rotation is written into full-precision weights, which are packed after it",
}
"""Pairs that work in the order of their stages only."""


def ordered(techniques: Sequence[Technique]) -> tuple[Technique, ...]:
    """The techniques in the order they are applied: by stage, then by name, whatever order they were given in.

    Raises:
        IncompatibleTechniques: one is given twice, or two exclude each other.
    """
    chosen = sorted(techniques, key=lambda t: (t.stage, t.name))
    for first, second in pairwise(chosen):
        if first.name == second.name:
            raise IncompatibleTechniques(f"{first.name} is given twice. Keep one of them.")
    for i, first in enumerate(chosen):
        for second in chosen[i + 1 :]:
            reason = EXCLUDES.get(frozenset({first.name, second.name}))
            if reason:
                raise IncompatibleTechniques(f"{first.name} and {second.name} do not go together: {reason}. Switch one of them off.")
    return tuple(chosen)


def compatible(techniques: Sequence[Technique]) -> bool:
    """True when these can be applied together."""
    try:
        ordered(techniques)
    except IncompatibleTechniques:
        return False
    return True
