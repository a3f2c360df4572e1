"""Method names as people type them: `baseline`, `bnb_int8`, `bnb_int8+word_removal:every=4`, `all_combined`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from core.bundle import Bundle
from core.compatibility import ordered
from core.errors import InvalidRequest
from core.technique import Technique
from engines.catalog import TECHNIQUES
from engines.combinations import ALL_COMBINED, Members, all_combined, offered_combinations

BASELINE = "baseline"
ALL = "all"
"""What a person types for every method there is."""
_LONGEST = 300


def parse_method(method: Any) -> tuple[Technique, ...]:
    """The techniques a method name stands for, in the order they are applied; none for `baseline`.

    Raises:
        InvalidRequest: unknown technique or option, or a value out of range; the message lists what there is.
        IncompatibleTechniques: members that exclude each other.
    """
    return members_of(method).techniques


def members_of(method: Any, bundle: Bundle | None = None) -> Members:
    """As `parse_method`, with what was left out and why. On `bundle`, the unmodified model, `all_combined` keeps only what that model admits."""
    if not isinstance(method, str) or not method.strip() or len(method) > _LONGEST:
        raise InvalidRequest(f"The method is {str(method)[:60]!r}; use baseline or technique names joined by +.")
    if method.strip() == BASELINE:
        return Members(())
    if depends_on_model(method):
        return all_combined(bundle)
    return Members(ordered([technique for part in method.split("+") for technique in _parse_part(part.strip())]))


def method_entry(method: str, bundle: Bundle | None = None) -> dict[str, Any]:
    """What a method stands for, as plain values: how it is spelled out, its members in the order they are applied, and what was left out."""
    members = members_of(method, bundle)
    return {
        "method": method.strip(), "spelled": method_name(members.techniques),
        "members": [t.name for t in members.techniques], "excluded": dict(members.excluded),
    }


def expand_all(methods: Sequence[str]) -> tuple[str, ...]:
    """The names, each once, `all` replaced by every name there is."""
    return tuple(dict.fromkeys(name for m in methods for name in (method_names() if m.strip() == ALL else (m.strip(),))))


def depends_on_model(method: str) -> bool:
    """Whether the model decides what a method stands for."""
    return method.strip() == ALL_COMBINED


def method_names() -> tuple[str, ...]:
    """Every name there is: the baseline, the techniques, the named combinations."""
    return (BASELINE, *TECHNIQUES, *offered_combinations())


def method_name(techniques: Sequence[Technique]) -> str:
    """The one spelling of a set of techniques; `parse_method` reads it back."""
    return "+".join(t.spell() for t in ordered(techniques)) or BASELINE


def make_technique(name: str, settings: dict[str, Any]) -> Technique:
    """A technique from its name and plain settings.

    Raises:
        InvalidRequest: unknown name or option, or a value out of range.
    """
    if name not in TECHNIQUES:
        near = difflib.get_close_matches(name, method_names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise InvalidRequest(f"There is no method {name[:60]!r}.{hint} There are: {', '.join(method_names())}.")
    known = {f.name for f in fields(TECHNIQUES[name])}
    for option in settings:
        if option not in known:
            raise InvalidRequest(f"{name} has no option {option[:40]!r}; it has {', '.join(sorted(known))}.")
    return TECHNIQUES[name](**settings)


def _parse_part(part: str) -> list[Technique]:
    """The technique, or the parts of the combination, that stands between two +."""
    if part.partition(":")[0].strip() == ALL_COMBINED:
        raise InvalidRequest(f"{ALL_COMBINED} stands alone: it has no options and takes no further techniques. Join the ones you want by +.")
    combination = offered_combinations().get(part)
    return [make_technique(name, {}) for name in combination.parts or ()] if combination else [_parse_technique(part)]


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
