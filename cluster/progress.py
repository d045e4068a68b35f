"""Progress items: what a driver sees of a layer while it moves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class LayerPhase(Enum):
    """Where a layer's item stands. Every item that begins reaches one of the last five."""

    WAITING = "waiting"
    FETCHING = "fetching"
    EXTRACTING = "extracting"
    DONE = "done"
    JOINED = "joined"
    PRESENT = "present"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_end(self) -> bool:
        """Tell whether an item in this phase has ended."""
        return self in _ENDS


_ENDS = frozenset({LayerPhase.DONE, LayerPhase.JOINED, LayerPhase.PRESENT, LayerPhase.CANCELLED, LayerPhase.FAILED})


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressItem:
    """The last state of one item; a later one with the same *item* replaces it."""

    #: ``fetch:DIGEST``, ``extract:NODE:CHAIN``, ``push:DIGEST``; "" ends the stream.
    item: str
    phase: LayerPhase
    current_bytes: int = 0
    total_bytes: int = 0
    #: An error's message, or where a layer came from.
    detail: str = ""
