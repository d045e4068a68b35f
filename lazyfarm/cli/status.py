"""``lazyfarm status``: what runs, and whether it is well."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import EXIT_ERROR, reporting
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.cli.output import Output

if TYPE_CHECKING:
    from lazyfarm.cli import documents
    from lazyfarm.status import FarmStatus

app = command_app()


@app.command(epilog=example("lazyfarm status --json"))
def status(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Show nodes, services and actors. Exit 0: all is well; 1: something isn't, and is named.

    Reads Redis only, and never joins Ray; `lazyfarm doctor` looks deeper.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        found = parts.status(parts.driving_settings(state_dir))
        show(found, out)
        if found.problems:
            if not as_json:
                out.stderr.write(
                    f"error: {'; '.join(found.problems)} (hint: `lazyfarm up` repairs, `lazyfarm doctor` says more)\n"
                )
            raise typer.Exit(EXIT_ERROR)


def show(found: FarmStatus, out: Output, more: Mapping[str, object] | None = None) -> None:
    """Print what runs, and *more* in the document."""
    shown = {**document(found), **(more or {})}
    out.document({**shown, "problems": [*found.problems]} if found.problems else shown)
    services = [("redis", found.redis), ("s3", found.s3), ("ray", found.ray)]
    started = [("jobs", found.jobs), ("page", found.page), ("gateway", found.gateway)]
    out.table(("SERVICE", "ADDRESS"), [*services, *((name, url) for name, url in started if url)])
    out.line("")
    out.table(("NODE", "ADDRESS", "STATE"), [(node.id, node.address, node.state) for node in found.nodes])
    out.line("")
    out.table(
        ("ACTOR", "KIND", "NODE", "PID", "STATE"),
        [(actor.name, actor.kind, actor.node, str(actor.pid), actor.state) for actor in found.actors],
        numbers=("PID",),
    )


def document(found: FarmStatus) -> documents.Status:
    """Return the JSON document of ``status`` and ``up``."""
    return {
        "nodes": [
            {"id": node.id, "address": node.address, "alive": node.alive, "draining": node.draining}
            for node in found.nodes
        ],
        "redis": found.redis,
        "s3": found.s3,
        "ray": found.ray,
        "jobs": found.jobs or None,
        "page": found.page or None,
        "gateway": found.gateway or None,
        "actors": [
            {"name": actor.name, "kind": actor.kind, "node": actor.node, "pid": actor.pid, "state": actor.state}
            for actor in found.actors
        ],
    }
