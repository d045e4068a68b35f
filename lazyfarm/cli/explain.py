"""``lazyfarm explain``: why things are as they are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.human import count, duration, short, size
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example

if TYPE_CHECKING:
    from lazyfarm.explain import LayerWait

app = command_app()


@app.callback(epilog=example("lazyfarm explain wait debian:12"))
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
