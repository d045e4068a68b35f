"""``lazyfarm prune``: make room in the content store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import short, size
from lazyfarm.cli.node_disks import NodeOption, NodesOption, in_all, tell_pruned
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.cli.quantities import parse_duration, parse_size

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Sequence

    from cluster.collect.runner import Pruned
    from cluster.collect.values import Item
    from cluster.messages import NodePruneResult
    from lazyfarm.cli import documents
    from lazyfarm.collection import FarmCollection
    from lazyfarm.farm import Farm

app = command_app()


@app.command(
    epilog=example(
        "lazyfarm prune --dry-run",
        "lazyfarm prune --keep-bytes 500GB --keep-duration 7d",
        "lazyfarm prune --all --filter description~=nightly",
        "lazyfarm prune --nodes --filter type==exec.cachemount",
    )
)
def prune(
    *,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also what several refs or images share.")] = False,
    keep_bytes: Annotated[
        str, typer.Option(metavar="SIZE", help="What may stay, as 500GB or 2TiB; the least useful goes first.")
    ] = "",
    keep_duration: Annotated[
        str, typer.Option(metavar="DURATION", help="Keep what was used within it, as 12h or 7d.")
    ] = "",
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="FILTER",
            help="FIELD==VALUE, FIELD!=VALUE or FIELD~=REGEX of id, parents, type, description, inuse, shared, "
            "private or lazy; with commas: all of them. Given several times: one of them.",
        ),
    ] = None,
    nodes: NodesOption = False,
    node: NodeOption = None,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Remove what nobody holds from the bucket, or from the nodes' disks.

    `lazyfarm explain kept REF` says what holds a ref, `lazyfarm du --nodes` what holds something on a disk. Objects in
    the bucket are deleted collect.grace_s seconds later; for it Ray is not joined. --keep-bytes is for each node.
    """
    of_nodes = nodes or node is not None
    if of_nodes and everything:
        raise typer.BadParameter("--all is of the bucket: on a node's disk nothing is shared")
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        wanted_bytes = parse_size("--keep-bytes", keep_bytes) if keep_bytes else 0
        wanted_s = parse_duration("--keep-duration", keep_duration) if keep_duration else 0.0
        settings = parts.driving_settings(state_dir)
        if of_nodes:

            def act(farm: Farm) -> Awaitable[Sequence[NodePruneResult]]:
                return farm.prune_nodes(
                    node, keep_bytes=wanted_bytes, keep_duration_s=wanted_s, filters=filters or (), dry_run=dry_run
                )

            tell_pruned(out, parts.acting(settings, out, "prune", act))
            return

        def prune_store(farm: Farm | FarmCollection) -> Coroutine[None, None, Pruned]:
            return farm.prune(
                everything=everything,
                keep_bytes=wanted_bytes,
                keep_duration_s=wanted_s,
                filters=filters or (),
                dry_run=dry_run,
            )

        if settings.gateway:
            pruned = parts.acting(settings, out, "prune", prune_store)
        else:
            pruned = parts.with_collection(settings, prune_store)
        out.document(document(pruned))
        for item in pruned.items:
            # A driver's files have the key of their object for an ID: cut short, one is like another.
            name = short(item.id) if ":" in item.id else item.id
            out.line(f"{name}  {size(item.size_bytes)}  {item.description}".rstrip())
        out.line(in_all(pruned))


def document(pruned: Pruned) -> documents.BucketPruned:
    """Return the JSON document; sizes are bytes, times wall-clock seconds."""
    return {
        "items": [_item(item) for item in pruned.items],
        "freed": pruned.freed_bytes,
        "kept": pruned.kept,
        "dry_run": pruned.is_dry_run,
    }


def _item(item: Item) -> documents.PrunedItem:
    return {
        "id": item.id,
        "type": item.kind.value,
        "size": item.size_bytes,
        "last_used": item.last_used_wall_s,
        "usage_count": item.usage_count,
        "shared": item.is_shared,
        "description": item.description,
    }
