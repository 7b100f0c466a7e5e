"""Numbers for people: 12.3 GiB, 1.05 B."""

from __future__ import annotations


def bytes_text(size: float) -> str:
    """A size in the largest binary unit that leaves at least 1: "512 B", "3.0 MiB", "1.25 GiB"."""
    for unit, digits in (("B", 0), ("KiB", 1), ("MiB", 1)):
        if abs(size) < 1024:
            return f"{size:.{digits}f} {unit}"
        size /= 1024
    return f"{size:,.2f} GiB"


def count_text(count: float) -> str:
    """A count in thousands, millions, billions or trillions: "950", "12.3 K", "1.05 B"."""
    for unit in ("", " K", " M", " B"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.0f} T" if abs(count) >= 99.95 else f"{count:.3g} T"
