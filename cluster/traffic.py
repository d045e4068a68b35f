"""What a farm has moved, and what it has not had to move: the figures that laziness is judged by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Self

from cluster.digest import Digest
from cluster.messages import LayerFetch, LayerPush
from cluster.ref import RefState

#: How a layer got to a registry that it was not sent to, or nowhere: it never leaves its owner's.
_NOT_SENT = frozenset({"exists", "mounted"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Figures of some time, or of one call."""

    #: Bytes of layers read from registries.
    fetched_bytes: int = 0
    #: Bytes of layers that somebody needed and that were there, or came by another's fetch.
    not_fetched_bytes: int = 0
    #: Layers that were waited for while another call fetched them.
    joined: int = 0
    #: Bytes of layers sent to registries.
    pushed_bytes: int = 0
    #: Bytes of layers that a push did not send: the registry had them, or mounted them from a repository of its own.
    not_pushed_bytes: int = 0

    def __add__(self, other: Self) -> Self:
        mine, others = asdict(self), asdict(other)
        return type(self)(**{name: mine[name] + others[name] for name in mine})

    @property
    def avoided_bytes(self) -> int:
        """Return the bytes that were not moved."""
        return self.not_fetched_bytes + self.not_pushed_bytes

    @property
    def figures(self) -> dict[str, int]:
        """Return the figures that are not 0, by name."""
        return {name: value for name, value in asdict(self).items() if value}

    @classmethod
    def of_figures(cls, figures: Mapping[str, int]) -> Self:
        """Return what :attr:`figures` told, and maybe a later release: figures that are unknown here are left out."""
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in figures.items() if name in known})


def fetch_traffic(layers: Iterable[LayerFetch], chain: Iterable[RefState]) -> Traffic:
    """Return what it came to that the layers of a chain were needed in the content store."""
    sizes = blob_sizes(chain)
    layers = [layer for layer in layers if layer.source != "snapshot"]  # its bytes were not needed
    return Traffic(
        fetched_bytes=sum(layer.bytes_fetched for layer in layers),
        not_fetched_bytes=sum(sizes.get(layer.digest, 0) for layer in layers if not layer.bytes_fetched),
        joined=sum(layer.joined for layer in layers),
    )


def push_traffic(layers: Iterable[LayerPush], chain: Iterable[RefState]) -> Traffic:
    """Return what it came to that a chain was pushed."""
    sizes = blob_sizes(chain)
    layers = list(layers)
    return Traffic(
        pushed_bytes=sum(layer.bytes for layer in layers),
        not_pushed_bytes=sum(sizes.get(layer.digest, 0) for layer in layers if layer.how in _NOT_SENT),
    )


def blob_sizes(chain: Iterable[RefState]) -> dict[Digest, int]:
    """Return the bytes of each layer of a chain, by its blob."""
    return {state.record.blob.digest: state.record.blob.size_bytes for state in chain}
