"""Snapshotters: layers unpacked to trees on one node's disk."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, assert_never

from storage.snapshots.base import LayeredSnapshotter
from storage.snapshots.copying import CopyingSnapshotter
from storage.snapshots.limits import LayerLimits
from storage.snapshots.overlay import OverlaySnapshotter, can_mount

__all__ = ["CopyingSnapshotter", "LayerLimits", "LayeredSnapshotter", "OverlaySnapshotter", "choose"]


def choose(
    root: Path, kind: Literal["auto", "overlay", "copying"], limits: LayerLimits | None = None
) -> LayeredSnapshotter:
    """Return the snapshotter for *root*; ``auto`` is overlay where a mount there works, else copying.

    Raises:
        SnapshotError: *root* can't be used.
    """
    match kind:
        case "overlay":
            return OverlaySnapshotter(root, limits)
        case "copying":
            return CopyingSnapshotter(root, limits)
        case "auto":
            return OverlaySnapshotter(root, limits) if can_mount(root) else CopyingSnapshotter(root, limits)
        case _:
            assert_never(kind)
