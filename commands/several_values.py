"""Options that take several values: `--methods a b c` is read as `--methods a --methods b --methods c`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from typer.core import TyperCommand


def spread(words: Sequence[str], options: Collection[str]) -> list[str]:
    """The command line with each of `options` repeated for every value that follows it."""
    out: list[str] = []
    current, first = "", False
    for place, word in enumerate(words):
        if word == "--":
            return [*out, *words[place:]]
        if word.startswith("-"):
            current, first = (word if word in options else ""), True
            out.append(word)
        elif current and not first:
            out += [current, word]
        else:
            out.append(word)
            first = False
    return out


class SeveralValues(TyperCommand):
    """A command whose list options take several values each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, after giving every value its option."""
        several = {name for option in self.params if getattr(option, "multiple", False) for name in option.opts}
        return super().parse_args(ctx, spread(args, several))
