"""Where names of points go, so that they cover neither a point nor each other: the nearest of many places, one name after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Box = tuple[float, float, float, float]
_HALF = 5.5  # half of a line's height
_GAP = 3.5


def place_labels(dots: Mapping[str, tuple[float, float]], radii: Mapping[str, float], widths: Mapping[str, float], frame: Box) -> dict[str, tuple[float, float]]:
    """Offset of each name's left middle from its point, in the unit of `dots`.

    Args:
        dots: name -> place; the first named are placed first.
        radii: name -> radius of its marker. widths: name -> width of its text.
        frame: left, bottom, right and top that names should stay within.
    """
    taken: list[Box] = [(x - radii[n], y - radii[n], x + radii[n], y + radii[n]) for n, (x, y) in dots.items()]
    out: dict[str, tuple[float, float]] = {}
    for name, (x, y) in dots.items():
        wide = widths[name]
        best = min(_offsets(wide, radii[name]), key=lambda o: _cost(_box(x + o[0], y + o[1], wide), taken, frame, o))
        taken.append(_box(x + best[0], y + best[1], wide))
        out[name] = best
    return out


def _box(left: float, middle: float, wide: float) -> Box:
    return left, middle - _HALF, left + wide, middle + _HALF


def _offsets(wide: float, radius: float) -> list[tuple[float, float]]:
    near = radius + _GAP
    places = [(side, level * _HALF) for level in range(-18, 19) for side in (near, -near - wide, -wide / 2)]
    return [(dx, dy) for dx, dy in places if dx != -wide / 2 or abs(dy) >= near + 2]


def _cost(box: Box, taken: Sequence[Box], frame: Box, offset: tuple[float, float]) -> float:
    """Overlap and leaving the frame cost most, then distance; the right side is read most easily."""
    x0, y0, x1, y1 = box
    overlap = sum(max(0.0, min(x1, b[2]) - max(x0, b[0])) * max(0.0, min(y1, b[3]) - max(y0, b[1])) for b in taken)
    outside = max(0.0, frame[0] - x0) + max(0.0, x1 - frame[2]) + max(0.0, frame[1] - y0) + max(0.0, y1 - frame[3])
    return 50 * overlap + 200 * outside + abs(offset[1]) + (0.0 if offset[0] > 0 else 4.0)
