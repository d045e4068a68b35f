"""Refs as they cross the gateway."""

from __future__ import annotations

from cluster.gateway import RefView
from lazyfarm.ref import Ref


def view_of(ref: Ref) -> RefView:
    """Return what crosses of a ref."""
    return RefView(layers=ref.layers, image=ref.record, handlers=ref.handlers)
