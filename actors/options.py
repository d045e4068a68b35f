"""One table of Ray options per kind of actor: nothing else in the farm says them."""

from __future__ import annotations

from typing import Any

from cluster.topology import Kind

#: Calls at once an actor accepts: long polls of drivers wait here too; what runs is bounded inside.
_CONCURRENCY = 1000


def namespace(farm: str) -> str:
    """Return the Ray namespace of a farm."""
    return f"lazyfarm-{farm}"


def options(kind: Kind, *, name: str, farm: str, ray_node_id: str | None) -> dict[str, Any]:
    """Return the ``.options(…)`` of one actor.

    Detached, because handles from ``get_actor`` are weak and services outlive the driver that started
    them. Pinned hard, because ``num_cpus=0`` does not spread. Restarted by Ray while its node lives;
    a call in flight fails and is made again by whoever made it (``max_task_retries`` would run it
    twice without asking).
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy  # noqa: PLC0415  # Ray is slow to import

    chosen: dict[str, Any] = {
        "name": name,
        "namespace": namespace(farm),
        "lifetime": "detached",
        "num_cpus": 0,
        "max_restarts": -1,
        "max_task_retries": 0,
        "max_concurrency": 50 if kind is Kind.SUPERVISOR else _CONCURRENCY,
        "get_if_exists": True,
    }
    if ray_node_id is not None:
        chosen["scheduling_strategy"] = NodeAffinitySchedulingStrategy(ray_node_id, soft=False)
    return chosen
