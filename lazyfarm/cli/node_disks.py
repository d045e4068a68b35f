"""What lies on nodes' disks, for ``lazyfarm du --nodes`` and ``lazyfarm prune --nodes``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, TypeAlias

import typer

from lazyfarm.cli import completing
from lazyfarm.cli.human import count, duration, short, size

if TYPE_CHECKING:
    from cluster.collect.runner import Pruned
    from cluster.collect.values import Item
    from cluster.messages import NodePruneResult, NodeUsageResult
    from lazyfarm.cli import documents
    from lazyfarm.cli.output import Output

NodesOption: TypeAlias = Annotated[
    bool, typer.Option("--nodes", help="The nodes' disks, not the bucket: snapshots, cached blobs, cache mounts.")
]
NodeOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--node",
        metavar="ID",
        help="That node's disk alone, as `lazyfarm status` names it.",
        show_default=False,
        autocompletion=completing.nodes,
    ),
]


def tell_usage(out: Output, nodes: Sequence[NodeUsageResult]) -> None:
    """Print what lies where, the biggest first, and what is free."""
    out.document({"nodes": [_usage(node) for node in nodes]})
    now_s = time.time()
    out.table(
        ("NODE", "ID", "SIZE", "LAST USED", "HELD BY", "DESCRIPTION"),
        [
            (
                node.node,
                _short(item),
                size(item.size_bytes),
                f"{duration(max(now_s - item.last_used_wall_s, 0.0))} ago",
                item.held_by,
                item.description,
            )
            for node in nodes
            for item in sorted(node.items, key=lambda item: -item.size_bytes)
        ],
        numbers=("SIZE",),
    )
    out.line("")
    out.table(
        ("NODE", "TOTAL", "HELD", "DISK", "FREE"),
        [
            (
                node.node,
                size(sum(item.size_bytes for item in node.items)),
                size(sum(item.size_bytes for item in node.items if item.is_held)),
                size(node.disk_bytes),
                size(node.free_bytes),
            )
            for node in nodes
        ],
        numbers=("TOTAL", "HELD", "DISK", "FREE"),
    )


def tell_pruned(out: Output, nodes: Sequence[NodePruneResult]) -> None:
    """Print what went from which node."""
    out.document({"nodes": [_pruned(node) for node in nodes]})
    for node in nodes:
        for item in node.items:
            out.line(f"{node.node}  {_short(item)}  {size(item.size_bytes)}  {item.description}".rstrip())
    for node in nodes:
        out.line(f"{node.node}: {in_all(node)}")


def in_all(pruned: Pruned | NodePruneResult) -> str:
    """Return what a prune came to, in words."""
    doing = "would free" if pruned.is_dry_run else "freed"
    taken_up = f"; {count(pruned.kept, 'item')} taken up meanwhile" if pruned.kept else ""
    return f"{count(len(pruned.items), 'item')}, {doing} {size(pruned.freed_bytes)}{taken_up}"


def _short(item: Item) -> str:
    kind, _, name = item.id.partition(" ")
    return f"{kind} {short(name)}"


def _usage(node: NodeUsageResult) -> documents.NodeUsage:
    return {
        "node": node.node,
        "items": [_item(item) for item in node.items],
        "disk": node.disk_bytes,
        "free": node.free_bytes,
    }


def _pruned(node: NodePruneResult) -> documents.NodePruned:
    return {
        "node": node.node,
        "items": [_item(item) for item in node.items],
        "freed": node.freed_bytes,
        "kept": node.kept,
        "dry_run": node.is_dry_run,
    }


def _item(item: Item) -> documents.DiskItem:
    return {
        "id": item.id,
        "type": item.kind.value,
        "parents": list(item.parents),
        "size": item.size_bytes,
        "created": item.created_wall_s,
        "last_used": item.last_used_wall_s,
        "held_by": item.held_by,
        "description": item.description,
    }
