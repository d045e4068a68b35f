"""``lazyfarm verify``: read what is present, and tell what is not what it should be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import completing, parts
from lazyfarm.cli.boundary import EXIT_ERROR, reporting
from lazyfarm.cli.human import count, short, size
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example

if TYPE_CHECKING:
    from cluster.collect.verify import BlobFault, Verified
    from cluster.ports import ObjectInfo
    from lazyfarm.cli import documents
    from lazyfarm.cli.output import Output

app = command_app()

_MIB = 1024.0**2


@app.command(
    epilog=example("lazyfarm verify", "lazyfarm verify --repair --rate 20 debian:12", "lazyfarm verify --json")
)
def verify(
    *,
    refs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[REF|IMAGE]...",
            help="Whose layers. Default: all that are in the bucket.",
            show_default=False,
            autocompletion=completing.refs,
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make lazy what is missing or damaged: it is fetched anew when needed.")
    ] = False,
    rate: Annotated[
        float, typer.Option("--rate", min=0.0, metavar="MIB/S", help="What all nodes together read; 0: all they can.")
    ] = 100.0,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="Only list the damaged objects that were put aside, for a week.")
    ] = False,
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read the layers in the bucket and in the nodes' caches, and compare their digests.

    Exit status 1 if something is missing or damaged, and was not repaired. A node's damaged copy is dropped. Nodes that
    drain are left alone.
    """
    if quarantine and (refs or repair):
        raise typer.BadParameter("--quarantine only lists: it goes with no ref and not with --repair")
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        if quarantine:
            _tell_quarantine(out, parts.quarantined(parts.driving_settings(state_dir)))
            return
        settings = parts.driving_settings(state_dir)
        verified = parts.acting(
            settings,
            out,
            "verify",
            lambda farm: farm.verify(
                *(refs or ()), repair=repair, bytes_per_s=rate * _MIB, on_verified=lambda so_far: _progress(out, so_far)
            ),
        )
        if out.is_live:
            out.stdout.write("\r\x1b[K")
        out.document(document(verified))
        if verified.faults:
            out.table(
                ("BLOB", "SIZE", "WHAT", "WHERE", "NOW"),
                [
                    (short(fault.digest), size(fault.size_bytes), fault.kind.value, fault.node or "bucket", _now(fault))
                    for fault in verified.faults
                ],
                numbers=("SIZE",),
            )
        left = len(verified.unrepaired)
        out.line(
            f"{count(verified.blobs, 'blob')}, {size(verified.size_bytes)} read; "
            f"{count(len(verified.faults), 'fault')}, {left} left"
        )
        if left:
            raise typer.Exit(EXIT_ERROR)


def _progress(out: Output, so_far: Verified) -> None:
    if out.is_live:
        out.stdout.write(
            f"\r\x1b[K{count(so_far.blobs, 'blob')}, {size(so_far.size_bytes)}, {count(len(so_far.faults), 'fault')}"
        )
        out.stdout.flush()


def _now(fault: BlobFault) -> str:
    if not fault.is_repaired:
        return f"as it was: {fault.reason}"
    if fault.node:
        return "dropped"
    return f"lazy, {fault.quarantine}" if fault.quarantine else "lazy"


def _tell_quarantine(out: Output, found: Sequence[ObjectInfo]) -> None:
    out.document({"quarantine": [{"key": one.key, "size": one.size_bytes} for one in found]})
    out.table(("SIZE", "OBJECT"), [(size(one.size_bytes), one.key) for one in found], numbers=("SIZE",))


def document(verified: Verified) -> documents.Verified:
    """Return the JSON document; sizes are bytes."""
    return {
        "blobs": verified.blobs,
        "size": verified.size_bytes,
        "faults": [
            {
                "digest": fault.digest,
                "key": fault.key,
                "size": fault.size_bytes,
                "kind": fault.kind.value,
                "reason": fault.reason,
                "repaired": fault.is_repaired,
                "quarantine": fault.quarantine,
                "node": fault.node,
            }
            for fault in verified.faults
        ],
        "unrepaired": len(verified.unrepaired),
    }
