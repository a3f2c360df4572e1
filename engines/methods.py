"""Method names as people type them: `baseline`, `bnb_int8`, `bnb_int8+word_removal:every=4`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from core.compatibility import ordered
from core.errors import InvalidRequest
from core.technique import Technique
from engines.catalog import TECHNIQUES

BASELINE = "baseline"
_LONGEST = 300


def parse_method(method: Any) -> tuple[Technique, ...]:
    """The techniques a method name stands for, in the order they are applied; none for `baseline`.

    Raises:
        InvalidRequest: unknown technique or option, or a value out of range; the message lists what there is.
        IncompatibleTechniques: members that exclude each other.
    """
    if not isinstance(method, str) or not method.strip() or len(method) > _LONGEST:
        raise InvalidRequest(f"The method is {str(method)[:60]!r}; use baseline or technique names joined by +.")
    if method.strip() == BASELINE:
        return ()
    return ordered([_parse_technique(part.strip()) for part in method.split("+")])


def method_name(techniques: Sequence[Technique]) -> str:
    """The one spelling of a set of techniques; `parse_method` reads it back."""
    return "+".join(t.spell() for t in ordered(techniques)) or BASELINE


def make_technique(name: str, settings: dict[str, Any]) -> Technique:
    """A technique from its name and plain settings.

    Raises:
        InvalidRequest: unknown name or option, or a value out of range.
    """
    if name not in TECHNIQUES:
        near = difflib.get_close_matches(name, TECHNIQUES, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidRequest(f"There is no method {name[:60]!r}.{hint} There are: {', '.join((BASELINE, *TECHNIQUES))}.")
    known = {f.name for f in fields(TECHNIQUES[name])}
    for option in settings:
        if option not in known:
            raise InvalidRequest(f"{name} has no option {option[:40]!r}; it has {', '.join(sorted(known))}.")
    return TECHNIQUES[name](**settings)


def _parse_technique(part: str) -> Technique:
    name, _, rest = part.partition(":")
    if name == BASELINE:
        raise InvalidRequest("baseline is the model without techniques; it cannot be part of a combination.")
    settings: dict[str, Any] = {}
    for pair in filter(None, rest.split(",")):
        option, equals, value = pair.partition("=")
        if not equals:
            raise InvalidRequest(f"{name}: {pair[:40]!r} is no option; write option=value.")
        if option.strip() in settings:
            raise InvalidRequest(f"{name}: {option.strip()} is given twice. Keep one of them.")
        settings[option.strip()] = _parse_value(value.strip())
    return make_technique(name.strip(), settings)


def _parse_value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
