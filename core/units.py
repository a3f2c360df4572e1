"""Numbers to text: the only place where bytes become MiB and seconds become ms."""

from __future__ import annotations

import math

NOT_MEASURED = "–"


def format_bytes(count: float | None) -> str:
    """`1536` -> `1.5 KiB`."""
    if count is None:
        return NOT_MEASURED
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        shown = f"{value:.0f}" if unit == "B" or abs(value) >= 99.95 else f"{value:.1f}"
        if abs(float(shown)) < 1024 or unit == "GiB":
            return f"{shown} {unit}"
        value /= 1024
    raise AssertionError("unreachable")


def format_time_left(seconds: float) -> str:
    """An estimate, no finer than it is good for: whole seconds, minutes, or hours and minutes."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


def format_seconds(seconds: float | None) -> str:
    """`0.0123` -> `12.3 ms`, `75` -> `1 min 15 s`."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 0.99995:
        return f"{seconds * 1e3:.{2 if seconds < 0.01 else 1}f} ms"
    if seconds < 59.995:
        return f"{seconds:.2f} s"
    whole = round(seconds)
    return f"{whole // 60} min {whole % 60} s"


def format_number(value: float | None, digits: int = 3) -> str:
    """A plain number to `digits` significant digits, thousands parted by commas."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    if isinstance(value, int) or value == int(value):
        return f"{int(value):,}"
    magnitude = math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits - 1 - magnitude)}f}"


def format_ratio(value: float | None, reference: float | None) -> str:
    """`value / reference` as `1.25x`; a dash when either was not measured or the reference is 0."""
    if value is None or not reference:
        return NOT_MEASURED
    return f"{value / reference:.2f}x"


def format_percent(fraction: float | None) -> str:
    """`0.253` -> `25.3 %`."""
    return NOT_MEASURED if fraction is None else f"{100 * fraction:.1f} %"
