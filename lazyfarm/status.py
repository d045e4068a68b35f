"""What runs of a farm, and whether it is well, as far as its records and a knock at each address tell."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.messages import ActorRecord, NodeRecord
from cluster.settings import FarmSettings
from lazyfarm.cli.reach import Address, accepts, ray_address, url_address
from lazyfarm.records import FarmRecords
from storage.services.gateway import gateway_address
from storage.services.page import page_url

#: A service that takes longer to accept a connection is not well; and reading commands have 0.6 s in all.
_CONNECT_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class FarmStatus:
    """What runs. Addresses are as the farm's head has them; "" where there is no such thing."""

    nodes: tuple[NodeRecord, ...]
    actors: tuple[ActorRecord, ...]
    redis: str
    s3: str
    ray: str
    #: Where Ray jobs go.
    jobs: str
    page: str
    gateway: str
    #: What is wrong, each as one clause; empty: all is well.
    problems: tuple[str, ...]


async def status_of(settings: FarmSettings, records: FarmRecords) -> FarmStatus:
    """Return what runs."""
    nodes, actors = await asyncio.gather(records.nodes(), records.actors())
    return await asyncio.to_thread(look_at, settings, nodes, actors)


def look_at(settings: FarmSettings, nodes: Sequence[NodeRecord], actors: Sequence[ActorRecord]) -> FarmStatus:
    """Return what runs, of what is recorded and of who answers; blocks. That Redis does is known: it was read from."""
    config = settings.config
    # Where no Ray jobs go, nothing takes any that the farm would know of.
    jobs = settings.running.ray_jobs_url if settings.running else ""
    page, gateway = page_url(settings.state_dir), gateway_address(settings.state_dir)
    asked = {
        "ray": ray_address(config.ray.address),
        "s3": url_address(config.s3.endpoint),
        "jobs": url_address(jobs),
        "page": url_address(page),
        "gateway": url_address(gateway),
    }
    return FarmStatus(
        nodes=tuple(nodes),
        actors=tuple(actors),
        redis=config.redis.url,
        s3=config.s3.endpoint,
        ray=config.ray.address,
        jobs=jobs,
        page=page,
        gateway=gateway,
        problems=tuple(_problems(nodes, actors, asked)),
    )


def _problems(
    nodes: Sequence[NodeRecord], actors: Sequence[ActorRecord], asked: Mapping[str, Address | None]
) -> list[str]:
    problems = [] if any(node.alive for node in nodes) else ["no node is alive"]
    problems += [f"node {node.id} is dead" for node in nodes if not node.alive]
    if {node.state for node in nodes if node.alive} == {"draining"}:
        problems.append("every live node drains")
    problems += [f"actor {actor.name} is {actor.state}" for actor in actors if actor.state != "ready"]
    if not any(actor.kind == "supervisor" for actor in actors):
        problems.append("no supervisor runs")
    problems += [
        f"{name} at {address.host}:{address.port} accepts no connection"
        for name, address in asked.items()
        if address is not None and not accepts(address, timeout_s=_CONNECT_S)
    ]
    return problems
