"""``lazyfarm explain``: why things are as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, duration, short, size
from lazyfarm.cli.leases import document as lease_document
from lazyfarm.cli.leases import expiry, labels
from lazyfarm.cli.options import JsonOption, RefArgument, StateDirOption, command_app, example

if TYPE_CHECKING:
    from cluster.collect.stock import Hold
    from lazyfarm.explain import LayerWait

app = command_app()


@app.callback(epilog=example("lazyfarm explain kept debian:12", "lazyfarm explain wait debian:12"))
def explain() -> None:
    """Say why things are as they are. Reads records only: Ray is not joined."""


@app.command("wait", epilog=example("lazyfarm explain wait debian:12", "lazyfarm explain wait sha256:3ab1…"))
def wait(
    *,
    name: Annotated[
        str,
        typer.Argument(metavar="DIGEST|REF", help="A blob's digest, a ref, or an image.", show_default=False),
    ],
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whom a layer waits for: who fetches it, how fast, how long it will take, and who else waits."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        found = parts.with_explain(parts.running_settings(state_dir), lambda farm: farm.wait(name))
        out.document({"layers": [_document(layer) for layer in found]})
        for layer in found:
            out.line(f"{short(layer.digest)}  {_told(layer)}")
            for waiting in layer.asked_by:
                out.line(f"  for vertex {short(waiting.vertex)} of job {waiting.job}")


@app.command("kept", epilog=example("lazyfarm explain kept debian:12"))
def kept(*, ref: RefArgument, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Say what keeps a ref from being collected: which lease, of whom and until when, and what stands on it."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        found = parts.with_collection(parts.running_settings(state_dir), lambda farm: farm.kept(ref))
        out.document(
            {
                "ref": found.ref,
                "holds": [
                    {"lease": lease_document(hold.lease), "ref": hold.ref, "image": hold.image or None}
                    for hold in found.holds
                ],
                "children": list(found.children),
            }
        )
        for hold in found.holds:
            out.line(_held(hold, found.ref))
        for child in found.children:
            out.line(f"{short(child)} stands on it")
        if not found.holds:
            stays = "nothing holds it" + (", nor what stands on it" if found.children else "")
            out.line(f"{stays}: it goes with the next collection whose policy lets it go")


def _held(hold: Hold, ref_id: str) -> str:
    """Return one reason, in words: ``lease driver-1 (host=a pid=7) holds it, expires in 42 s``."""
    told = labels(hold.lease)
    held = "it" if hold.ref == ref_id else f"{short(hold.ref)}, which stands on it"
    held = f"{hold.image}, whose top is {held}" if hold.image else held
    until = expiry(hold.lease.expires_wall_s)
    ends = "has no expiry" if hold.lease.expires_wall_s is None else f"expires {until}"
    return f"lease {hold.lease.id}{f' ({told})' if told else ''} holds {held}, {ends}"


def _told(layer: LayerWait) -> str:
    if layer.state == "present":
        return f"present, {size(layer.total_bytes)}: waits for nothing"
    if layer.state == "lazy":
        return "lazy: nobody fetches it"
    told = [f"{layer.state} by {layer.owner}", f"{size(layer.current_bytes)} of {size(layer.total_bytes)}"]
    told.append(f"{size(layer.rate)}/s" if layer.rate else "nothing came while this looked")
    if layer.left_s is not None:
        told.append(f"{duration(layer.left_s)} left")
    told.append(f"{count(layer.waiters, 'worker')} waiting")
    told.append(f"another takes over in {duration(layer.lease_left_s)} if it dies")
    return ", ".join(told)


def _document(layer: LayerWait) -> dict[str, object]:
    return {
        "digest": layer.digest,
        "state": layer.state,
        "owner": layer.owner or None,
        "current": layer.current_bytes,
        "total": layer.total_bytes,
        "rate": layer.rate,
        "left_s": layer.left_s,
        "lease_left_s": layer.lease_left_s,
        "waiters": layer.waiters,
        "asked_by": [{"job": waiting.job, "vertex": waiting.vertex} for waiting in layer.asked_by],
    }
