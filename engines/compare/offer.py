"""The methods that a comparison offers, with what a person needs to choose among them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MethodInfo:
    """A method to offer. members: the techniques it stands for, in the order they are applied; none for the baseline."""

    name: str
    title: str
    summary: str
    members: tuple[str, ...]


def describe_methods() -> tuple[MethodInfo, ...]:
    """Baseline, every built technique, and the named combinations whose parts are built."""
    raise NotImplementedError
