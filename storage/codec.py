"""Payloads of one kind, as stores write and read them in bulk."""

from __future__ import annotations

from typing import Generic, TypeVar

from cluster import wire

T = TypeVar("T")


class Codec(Generic[T]):
    """Encodes and decodes the values of one type as payloads of one kind."""

    def __init__(self, kind: str, type_: type[T]) -> None:
        self.kind = kind
        self._reader = wire.Reader(kind, type_)

    def encode(self, value: T) -> bytes:
        """Return the payload of *value*."""
        return wire.encode(self.kind, value)

    def decode(self, data: bytes) -> T:
        """Return the value in a payload; raises as :func:`cluster.wire.decode`."""
        return self._reader.decode(data)
