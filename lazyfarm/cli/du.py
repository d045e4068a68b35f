"""``lazyfarm du``: what the content store is used for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import duration, short, size
from lazyfarm.cli.node_disks import NodeOption, NodesOption, tell_usage
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example

if TYPE_CHECKING:
    from cluster.collect.stock import ImageUse, RefUse, Usage
    from lazyfarm.cli import documents
    from lazyfarm.cli.output import Output

app = command_app()


@app.command(epilog=example("lazyfarm du", "lazyfarm du --refs", "lazyfarm du --nodes", "lazyfarm du --json"))
def du(
    *,
    refs: Annotated[bool, typer.Option("--refs", help="A line for each ref, not for each image.")] = False,
    nodes: NodesOption = False,
    node: NodeOption = None,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what takes how much in the bucket, or on the nodes' disks: what is in use, shared, and reclaimable.

    A lazy layer takes nothing; what it would take is told as avoided. Local is what drivers sent of directories. Of the
    bucket it reads records only: Ray is not joined. Of disks it asks their nodes.
    """
    of_nodes = nodes or node is not None
    if of_nodes and refs:
        raise typer.BadParameter("--refs are in the bucket, --nodes and --node are not: give one of them")
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = parts.driving_settings(state_dir)
        if of_nodes:
            tell_usage(out, parts.acting(settings, out, "du", lambda farm: farm.node_usage(node)))
            return
        if settings.gateway:
            usage = parts.acting(settings, out, "du", lambda farm: farm.du())
        else:
            usage = parts.with_collection(settings, lambda farm: farm.usage())
        out.document(document(usage))
        if refs:
            _tell_refs(out, usage.refs)
        else:
            _tell_images(out, usage.images)
        out.line("")
        out.fields(
            [
                ("total", size(usage.total_bytes)),
                ("reclaimable", size(usage.reclaimable_bytes)),
                ("avoided", size(usage.avoided_bytes)),
                ("local", size(usage.local_bytes)),
            ]
        )


def _tell_images(out: Output, images: tuple[ImageUse, ...]) -> None:
    out.table(
        ("IMAGE", "SIZE", "EXCLUSIVE", "AVOIDED", "IN USE"),
        [
            (
                image.name,
                size(image.size_bytes),
                size(image.exclusive_bytes),
                size(image.avoided_bytes),
                _yes(is_so=image.is_in_use),
            )
            for image in images
        ],
        numbers=("SIZE", "EXCLUSIVE", "AVOIDED"),
    )


def _tell_refs(out: Output, refs: tuple[RefUse, ...]) -> None:
    now_s = time.time()
    out.table(
        ("REF", "SIZE", "AVOIDED", "SHARED", "IN USE", "LAST USED", "USES", "DESCRIPTION"),
        [
            (
                short(ref.id),
                size(ref.size_bytes),
                size(ref.avoided_bytes),
                _yes(is_so=ref.is_shared),
                _yes(is_so=ref.is_in_use),
                f"{duration(max(now_s - ref.last_used_wall_s, 0.0))} ago",
                str(ref.usage_count),
                ref.description,
            )
            for ref in refs
        ],
        numbers=("SIZE", "AVOIDED", "USES"),
    )


def _yes(*, is_so: bool) -> str:
    return "yes" if is_so else ""


def document(usage: Usage) -> documents.BucketUsage:
    """Return the JSON document; sizes are bytes, times wall-clock seconds."""
    return {
        "refs": [
            {
                "ref": ref.id,
                "digest": ref.digest,
                "size": ref.size_bytes,
                "avoided": ref.avoided_bytes,
                "shared": ref.is_shared,
                "in_use": ref.is_in_use,
                "created": ref.created_wall_s,
                "last_used": ref.last_used_wall_s,
                "usage_count": ref.usage_count,
                "description": ref.description,
            }
            for ref in usage.refs
        ],
        "images": [
            {
                "image": image.name,
                "ref": image.ref,
                "size": image.size_bytes,
                "exclusive": image.exclusive_bytes,
                "avoided": image.avoided_bytes,
                "in_use": image.is_in_use,
            }
            for image in usage.images
        ],
        "total": usage.total_bytes,
        "reclaimable": usage.reclaimable_bytes,
        "avoided": usage.avoided_bytes,
        "local": usage.local_bytes,
    }
