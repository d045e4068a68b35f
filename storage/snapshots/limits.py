"""How much one layer may unpack to. A few kilobytes can say terabytes, or a million directories."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cluster.config import NodeConfig
from cluster.disk_room import ENTRY_BYTES, Spend
from cluster.errors import LayerLimitError

#: Bytes of paths that are remembered of one layer: names are kept in memory until it is published. Layers of a
#: hundred thousand directories come to a few MiB.
MAX_NAMES_BYTES: Final = 256 * 1024**2

_DEFAULT: Final = NodeConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLimits:
    """What one layer may come to at most."""

    #: Length of the uncompressed tar.
    tar_bytes: int = _DEFAULT.layer_bytes
    #: Entries, and directories that are made because an entry is in them.
    entries: int = _DEFAULT.layer_entries
    #: Bytes of the paths of its directories, and of the names that it deletes.
    names_bytes: int = MAX_NAMES_BYTES

    @classmethod
    def of(cls, config: NodeConfig) -> LayerLimits:
        """Return the limits that a node is configured with."""
        return cls(tar_bytes=config.layer_bytes, entries=config.layer_entries)


class LayerMeter:
    """Counts what one layer has come to, before it is made.

    Args:
        layer: Digest of the layer, for errors.
        limits: What it may come to.
        spend: Is told of the bytes of disk that it takes.
    """

    __slots__ = ("_layer", "_limits", "_made", "_names_bytes", "_tar_bytes", "spend")

    def __init__(self, layer: str, limits: LayerLimits, spend: Spend) -> None:
        self._layer = layer
        self.spend = spend
        self._limits = limits
        self._tar_bytes = 0
        self._made = 0
        self._names_bytes = 0

    def read(self, count: int) -> None:
        """Count bytes of the tar; raises LayerLimitError past the limit."""
        self._tar_bytes += count
        if self._tar_bytes > self._limits.tar_bytes:
            raise LayerLimitError(self._layer, "bytes", self._limits.tar_bytes)
        self.spend(count)

    def make(self) -> None:
        """Count something that is about to be made; raises LayerLimitError past the limit."""
        self._made += 1
        if self._made > self._limits.entries:
            raise LayerLimitError(self._layer, "entries", self._limits.entries)
        self.spend(ENTRY_BYTES)

    def remember(self, name: bytes) -> None:
        """Count a name that is about to be kept in memory; raises LayerLimitError past the limit."""
        self._names_bytes += len(name)
        if self._names_bytes > self._limits.names_bytes:
            raise LayerLimitError(self._layer, "bytes of names", self._limits.names_bytes)
