"""``lazyfarm status``: what runs, and whether it is well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from lazyfarm.cli import parts
from lazyfarm.cli.boundary import EXIT_ERROR, reporting
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example
from lazyfarm.cli.output import Output
from lazyfarm.cli.reach import Address, accepts, ray_address, url_address
from lazyfarm.settings import FarmSettings
from storage.services.gateway import gateway_address
from storage.services.page import page_url

if TYPE_CHECKING:
    from cluster.messages import ActorRecord, NodeRecord
    from lazyfarm.cli import documents

app = command_app()

#: A service that takes longer to accept a connection is not well; and reading commands have 0.6 s in all.
_CONNECT_S = 0.1


@app.command(epilog=example("lazyfarm status --json"))
def status(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Show nodes, services and actors. Exit 0: all is well; 1: something isn't, and is named.

    Reads Redis only, and never joins Ray; `lazyfarm doctor` looks deeper.
    """
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        settings = parts.running_settings(state_dir)
        problems = show(settings, out)
        if problems:
            if not as_json:
                out.stderr.write(
                    f"error: {'; '.join(problems)} (hint: `lazyfarm up` repairs, `lazyfarm doctor` says more)\n"
                )
            raise typer.Exit(EXIT_ERROR)


def show(settings: FarmSettings, out: Output, more: Mapping[str, object] | None = None) -> list[str]:
    """Print what runs, and *more* in the document; return what is wrong, each as one clause."""
    with parts.reading(settings) as records:
        nodes, actors = records.nodes(), records.actors()
    problems = find_problems(settings, nodes, actors)
    shown = {**document(settings, nodes, actors), **(more or {})}
    out.document({**shown, "problems": problems} if problems else shown)
    config = settings.config
    services = [("redis", config.redis.url), ("s3", config.s3.endpoint), ("ray", config.ray.address)]
    state_dir = settings.state_dir
    started = [("jobs", _jobs_url(settings)), ("page", page_url(state_dir)), ("gateway", gateway_address(state_dir))]
    out.table(("SERVICE", "ADDRESS"), [*services, *((name, url) for name, url in started if url)])
    out.line("")
    out.table(("NODE", "ADDRESS", "STATE"), [(node.id, node.address, node.state) for node in nodes])
    out.line("")
    out.table(
        ("ACTOR", "KIND", "NODE", "PID", "STATE"),
        [(actor.name, actor.kind, actor.node, str(actor.pid), actor.state) for actor in actors],
        numbers=("PID",),
    )
    return problems


def document(settings: FarmSettings, nodes: Sequence[NodeRecord], actors: Sequence[ActorRecord]) -> documents.Status:
    """Return the JSON document of ``status`` and ``up``."""
    config = settings.config
    return {
        "nodes": [
            {"id": node.id, "address": node.address, "alive": node.alive, "draining": node.draining} for node in nodes
        ],
        "redis": config.redis.url,
        "s3": config.s3.endpoint,
        "ray": config.ray.address,
        "jobs": _jobs_url(settings) or None,
        "page": page_url(settings.state_dir) or None,
        "gateway": gateway_address(settings.state_dir) or None,
        "actors": [
            {"name": actor.name, "kind": actor.kind, "node": actor.node, "pid": actor.pid, "state": actor.state}
            for actor in actors
        ],
    }


def find_problems(settings: FarmSettings, nodes: Sequence[NodeRecord], actors: Sequence[ActorRecord]) -> list[str]:
    """Return what is wrong, each as one clause. That Redis answers is known: it was read from."""
    problems = [] if any(node.alive for node in nodes) else ["no node is alive"]
    problems += [f"node {node.id} is dead" for node in nodes if not node.alive]
    if {node.state for node in nodes if node.alive} == {"draining"}:
        problems.append("every live node drains")
    problems += [f"actor {actor.name} is {actor.state}" for actor in actors if actor.state != "ready"]
    if not any(actor.kind == "supervisor" for actor in actors):
        problems.append("no supervisor runs")
    problems += [
        f"{name} at {address.host}:{address.port} accepts no connection"
        for name, address in _addresses(settings)
        if not accepts(address, timeout_s=_CONNECT_S)
    ]
    return problems


def _addresses(settings: FarmSettings) -> list[tuple[str, Address]]:
    config = settings.config
    found = [
        ("ray", ray_address(config.ray.address)),
        ("s3", url_address(config.s3.endpoint)),
        ("jobs", url_address(_jobs_url(settings))),
        ("page", url_address(page_url(settings.state_dir))),
        ("gateway", url_address(gateway_address(settings.state_dir))),
    ]
    return [(name, address) for name, address in found if address is not None]


def _jobs_url(settings: FarmSettings) -> str:
    """Return where `ray job submit` goes; "" where nothing takes jobs that the farm would know of."""
    return settings.running.ray_jobs_url if settings.running else ""
