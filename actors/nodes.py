"""The nodes of the cluster as Ray tells of them, under the farm's names. The process has joined it."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import ray

from cluster.topology import NodeView

#: Label that the nodes carry which a farm started; others go by their Ray ID.
NODE_LABEL = "lazyfarm-node"
#: Resource that Ray gives the node of the GCS.
_HEAD_RESOURCE = "node:__internal_head__"


@dataclass(frozen=True, slots=True, kw_only=True)
class ObservedNode:
    """A node of the cluster, alive or dead."""

    view: NodeView
    address: str
    is_alive: bool
    is_head: bool
    #: A farm started it, so a farm can start it again under its name.
    is_labelled: bool


def observe_nodes() -> list[ObservedNode]:
    """Return every node that Ray knows, dead ones of earlier times too."""
    observed = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]  # Ray doesn't say
        label = (node.get("Labels") or {}).get(NODE_LABEL)
        observed.append(
            ObservedNode(
                view=NodeView(name=label or f"node-{node['NodeID'][:8]}", ray_id=node["NodeID"]),
                address=node["NodeManagerAddress"],
                is_alive=bool(node["Alive"]),
                is_head=_HEAD_RESOURCE in (node.get("Resources") or {}),
                is_labelled=label is not None,
            )
        )
    return observed


def live_nodes(observed: Collection[ObservedNode]) -> list[NodeView]:
    """Return the live ones."""
    return [node.view for node in observed if node.is_alive]


def worth_telling(observed: Collection[ObservedNode], taken_down: Collection[str]) -> list[ObservedNode]:
    """Return the nodes of which the farm tells, by name: the live ones, and dead ones that are missed.

    A node that runs again under its name has one live record: its dead ones say nothing more. Nobody misses one
    that was taken down on purpose, or one that no farm started: it would come back under another name.
    """
    live = {node.name for node in live_nodes(observed)}
    missed = {
        node.view.name: node
        for node in observed
        if node.is_labelled and not node.is_alive and node.view.name not in live and node.view.name not in taken_down
    }
    shown = [node for node in observed if node.is_alive] + list(missed.values())
    return sorted(shown, key=lambda node: node.view.name)
