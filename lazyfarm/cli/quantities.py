"""Durations and sizes as people write them."""

from __future__ import annotations

import re
from types import MappingProxyType

from cluster.errors import InvalidArgumentError

_SECONDS = MappingProxyType({"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0})
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhdw])+\Z")
_DURATION_PART = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\Z", re.IGNORECASE)
_POWERS = MappingProxyType({"": 0, "k": 1, "m": 2, "g": 3, "t": 4})


def parse_duration(name: str, text: str) -> float:
    """Return seconds of ``90s``, ``1h30m``, ``7d``; InvalidArgumentError names the option *name*."""
    if not _DURATION.match(text):
        raise InvalidArgumentError(name, repr(text), "write it as 90s, 1h30m, 7d or 2w")
    return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION_PART.findall(text))


def parse_size(name: str, text: str) -> int:
    """Return bytes of ``512MB`` (1000-fold), ``10GiB`` (1024-fold) or a number; InvalidArgumentError as above."""
    found = _SIZE.match(text)
    if found is None:
        raise InvalidArgumentError(name, repr(text), "write it as 512MB, 10GiB or a number of bytes")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** _POWERS[unit.lower()])
