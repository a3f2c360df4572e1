"""How far the work is, and how long the rest will take by the cells that this run has measured."""

from __future__ import annotations

from collections import Counter, defaultdict

from engines.compare.comparison import Comparison
from engines.compare.plan import CellKey

_KINDS = ("answer", "score")


class Pace:
    """Counts what is left by kind of work, model and method. An answer and its score count half a cell each."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison
        self._left: dict[CellKey, tuple[str, ...]] = {}
        self._counts: Counter[tuple[str, int, int]] = Counter()
        self._taken: dict[tuple[str, int, int], list[float]] = defaultdict(list)
        for key in comparison.planned():
            self._left[key] = ()
            self.update(key)

    def update(self, key: CellKey) -> None:
        """Count a cell anew, after it has changed."""
        for kind in self._left[key]:
            self._counts[kind, key.model, key.method] -= 1
        finished, answered = self._comparison.finished(key), self._comparison.answered(key)
        self._left[key] = () if finished else _KINDS[1:] if answered else _KINDS
        for kind in self._left[key]:
            self._counts[kind, key.model, key.method] += 1

    def measured(self, kind: str, key: CellKey, seconds: float) -> None:
        """One answer or score that ran."""
        self._taken[kind, key.model, key.method].append(seconds)

    @property
    def fraction(self) -> float:
        """The part that is done."""
        return 1 - self._counts.total() / (len(_KINDS) * len(self._left))

    @property
    def seconds_left(self) -> float | None:
        """Time of the rest; None before the first answer was measured. A method not seen yet is taken for the mean of the others."""
        means = {place: sum(taken) / len(taken) for place, taken in self._taken.items()}
        usual: dict[str, float] = {}
        for kind in _KINDS:
            seen = [mean for place, mean in means.items() if place[0] == kind]
            if seen:
                usual[kind] = sum(seen) / len(seen)
        if not usual:
            return None if self._counts.total() else 0.0
        anything = next(iter(usual.values()))
        return sum(count * means.get(place, usual.get(place[0], anything)) for place, count in self._counts.items())
