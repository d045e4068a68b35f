"""Figures and names as people read them."""

from __future__ import annotations

_KIB = 1024.0
_MINUTE_S = 60.0
_HOUR_S = 3600.0
_DAY_S = 86400.0
_SHORT_HEX = 12


def size(count_bytes: float) -> str:
    """Return a size in the binary unit that leaves one to four digits: ``0 B``, ``20.0 MiB``."""
    value = float(count_bytes)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < _KIB or unit == "TiB":
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= _KIB
    raise AssertionError  # the last unit always returns


def duration(seconds: float) -> str:
    """Return a duration: ``0.42 s``, ``12 s``, ``3 min``, ``5 h``, ``7 d``."""
    for limit, unit_s, unit in ((2 * _MINUTE_S, 1.0, "s"), (2 * _HOUR_S, _MINUTE_S, "min"), (2 * _DAY_S, _HOUR_S, "h")):
        if abs(seconds) < limit:
            value = seconds / unit_s
            return f"{value:.2f} {unit}" if unit == "s" and abs(value) < 10 else f"{value:.0f} {unit}"  # noqa: PLR2004 - two digits
    return f"{seconds / _DAY_S:.0f} d"


def short(digest: str) -> str:
    """Return a digest or ref ID cut to what tells two apart, and is still accepted as a prefix."""
    algorithm, colon, text = digest.partition(":")
    return f"{algorithm}{colon}{text[:_SHORT_HEX]}" if colon else digest[:_SHORT_HEX]


def count(number: int, noun: str) -> str:
    """Return ``1 layer``, ``2 layers``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
