"""What is wrong between this machine and a farm's gateway, and with the farm behind it: ``lazyfarm doctor`` outside."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from importlib.metadata import version

from cluster.errors import ClusterError
from lazyfarm.doctor import Finding, examine_outside, find_actors, find_registries
from lazyfarm.farm import source_of
from lazyfarm.gateway.access import Access
from lazyfarm.gateway.farm import GatewayFarm
from lazyfarm.gateway.records import GatewayRecords

_CHECK = "gateway"


def examine_gateway(url: str, environ: Mapping[str, str]) -> list[Finding]:
    """Run every check: this machine's, the way to the gateway at *url*, and what the farm behind it says of itself."""
    return [*examine_outside(), *asyncio.run(_examine(url, environ))]


async def _examine(url: str, environ: Mapping[str, str]) -> list[Finding]:
    findings: list[Finding] = []
    try:
        async with await GatewayFarm.open(Access.of(url, environ), credentials=source_of({}), keep=False) as farm:
            findings.append(_release(url, farm.release))
            records = GatewayRecords(farm)
            findings += await find_actors(records, "lazyfarm up and lazyfarm doctor on the farm's head")
            findings += await find_registries(records)
    except ClusterError as exc:
        findings.append(Finding(check=_CHECK, ok="fail", detail=str(exc), advice=exc.hint))
    return findings


def _release(url: str, theirs: str) -> Finding:
    ours = version("lazyfarm")
    if ours == theirs:
        return Finding(check=_CHECK, ok="ok", detail=f"{url}, release {theirs}")
    return Finding(
        check=_CHECK,
        ok="warn",
        detail=f"{url}: its release is {theirs or 'unknown'}, this is {ours}",
        advice="a call that one of them doesn't know fails by itself; install the farm's release here",
    )
