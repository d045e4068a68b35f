"""Snapshotters: layers unpacked to trees on one node's disk."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, assert_never

from storage.snapshots.base import LayeredSnapshotter
from storage.snapshots.copying import CopyingSnapshotter
from storage.snapshots.overlay import OverlaySnapshotter, can_mount

__all__ = ["CopyingSnapshotter", "LayeredSnapshotter", "OverlaySnapshotter", "choose"]


def choose(root: Path, kind: Literal["auto", "overlay", "copying"]) -> LayeredSnapshotter:
    """Return the snapshotter for *root*; ``auto`` is overlay where a mount there works, else copying.

    Raises:
        SnapshotError: *root* can't be used.
    """
    match kind:
        case "overlay":
            return OverlaySnapshotter(root)
        case "copying":
            return CopyingSnapshotter(root)
        case "auto":
            return OverlaySnapshotter(root) if can_mount(root) else CopyingSnapshotter(root)
        case _:
            assert_never(kind)
