"""Payloads of one kind, read in bulk.

:func:`cluster.wire.decode` checks a payload by way of plain data. After the constant header of its kind,
the body can be read straight into a typed value, at less than half of the time; whatever is not as it
should be is left to :mod:`cluster.wire` to judge.
"""

from __future__ import annotations

from typing import Generic, TypeVar

import msgspec

from cluster import wire
from cluster.errors import ClusterError

T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes and decodes the values of one type as payloads of one kind."""

    def __init__(self, kind: str, type_: type[T]) -> None:
        self.kind = kind
        self._type = type_
        self._header = wire.header(kind)
        self._skip = len(self._header)
        self._decoder = msgspec.msgpack.Decoder(type_)

    def encode(self, value: T) -> bytes:
        """Return the payload of *value*."""
        return wire.encode(self.kind, value)

    def decode(self, data: bytes) -> T:
        """Return the value in a payload; raises as :func:`cluster.wire.decode`."""
        if data.startswith(self._header):
            try:
                return self._decoder.decode(memoryview(data)[self._skip :])
            except (msgspec.DecodeError, ValueError, RecursionError, ClusterError):
                pass  # told properly below; ValueError: msgspec lets bad UTF-8 through as such
        return wire.decode(self.kind, self._type, data)
