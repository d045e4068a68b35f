"""What runs of a farm, and whether it is well, as far as its records and a knock at each address tell."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
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
    config = settings.config
    return FarmStatus(
        nodes=tuple(nodes),
        actors=tuple(actors),
        redis=config.redis.url,
        s3=config.s3.endpoint,
        ray=config.ray.address,
        jobs=_jobs_url(settings),
        page=page_url(settings.state_dir),
        gateway=gateway_address(settings.state_dir),
        problems=tuple(await asyncio.to_thread(find_problems, settings, nodes, actors)),
    )


def find_problems(settings: FarmSettings, nodes: Sequence[NodeRecord], actors: Sequence[ActorRecord]) -> list[str]:
    """Return what is wrong, each as one clause; blocks. That Redis answers is known: it was read from."""
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
