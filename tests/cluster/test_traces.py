"""Traces of a real farm of two nodes, as a real collector receives them."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.connect import connect
from storage.flights import RedisFlightStore
from storage.keys import Keys
from tests.doubles.collector import collecting
from tests.doubles.farm import FAST, RunningFarm, running_farm
from tests.doubles.registry import random_image
from tests.doubles.registry_faults import Hang, blobs, registry_fault_proxy
from tests.doubles.shell_image import shell_image

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector():
    with collecting() as found:
        yield found


@pytest.fixture(scope="module")
def traced(collector):
    """A farm that sends its spans to the collector."""
    with running_farm(nodes=2, environ={**FAST, "LAZYFARM__TRACING__ENDPOINT": collector.url}) as found:
        yield found


def _dockerfile(directory: Path, base: str) -> str:
    directory.mkdir()
    (directory / "Dockerfile").write_text(f"FROM {base}\nRUN cat /words > /copy\n")
    return str(directory)


def _under(farm: RunningFarm, traceparent: str) -> RunningFarm:
    """Return a farm whose commands have a caller of that span."""
    return RunningFarm(farm.state_dir, farm.settings, {**farm.environ, "TRACEPARENT": traceparent})


def _ancestors(spans, span):
    """Return the names of the spans above one, the nearest first, with their services."""
    by_id = {each.id: each for each in spans}
    found = []
    while (span := by_id.get(span.parent)) is not None:
        found.append((span.service.removeprefix("lazyfarm-"), span.name))
    return found


def _is_whole(spans):
    """Tell whether all processes have told of the build: each sends its spans when it comes to it."""
    spans = [span for span in spans if span.trace == TRACE]
    below = {(span.parent, span.name) for span in spans}
    transfers = [span.id for span in spans if span.name == "transfer"]
    return (
        {"job", "lazyfarm build", "op", "keep", "unpack"} <= {span.name for span in spans}
        and len(transfers) == 3
        and all((each, name) in below for each in transfers for name in ("GET", "S3/PutObject"))
        and {span.parent for span in spans} <= {PARENT, *(span.id for span in spans)}
    )


def test_a_build_is_one_trace_from_the_command_to_the_registry(traced, collector, registry, tmp_path):
    """Driver, scheduler, op worker and fetch worker tell one tree of spans, each under what asked for it."""
    registry.push("base", "1", shell_image(secrets.token_hex(8)))
    context = _dockerfile(tmp_path / "context", f"{registry.host}/base:1")
    built = json.loads(_under(traced, f"00-{TRACE}-{PARENT}-01").cli("build", "--json", context).stdout)

    spans = [span for span in collector.wait(_is_whole) if span.trace == TRACE]
    assert [span.name for span in spans if span.parent == PARENT] == ["lazyfarm build"]
    assert [span for span in spans if span.error is not None] == []
    assert {span.service for span in spans} >= {
        "lazyfarm-driver",
        "lazyfarm-solver-scheduler",
        "lazyfarm-op-worker",
        "lazyfarm-fetch-worker",
    }

    (job,) = [span for span in spans if span.name == "job"]
    assert job.attributes["lazyfarm.job.id"] == built["job"]
    assert _ancestors(spans, job) == [("driver", "submit"), ("driver", "solve"), ("driver", "lazyfarm build")]
    above_job = [("solver-scheduler", "job"), *_ancestors(spans, job)]
    (op,) = [span for span in spans if span.name == "op"]
    above_op = [
        ("op-worker", "OpWorker/run_op"),
        ("solver-scheduler", "OpWorker/run_op"),
        ("solver-scheduler", "run"),
        ("solver-scheduler", "vertex"),
    ]
    assert _ancestors(spans, op) == above_op + above_job
    layers = [span for span in spans if span.name == "transfer"]
    assert len(layers) == 3
    for layer in layers:
        assert _ancestors(spans, layer) == [
            ("fetch-worker", "flight"),
            ("fetch-worker", "unlazy"),
            ("fetch-worker", "FetchWorker/extract"),
            ("solver-scheduler", "FetchWorker/extract"),
            *above_op[2:],
            *above_job,
        ]
        below = {span.name: span for span in spans if span.parent == layer.id}
        assert below["GET"].attributes["http.response.status_code"] == 200
        assert below["GET"].attributes["server.address"] == registry.host.partition(":")[0]
        assert below["GET"].kind == below["S3/PutObject"].kind == "client"
    names = {span.name for span in spans}
    assert {"cache map", "cache lookup", "keep", "unpack", "FetchWorker/resolve_image"} <= names


def test_who_joins_a_flight_links_to_its_owner_s_span(traced, collector, registry):
    """Two commands, two traces; the one that waited says whose flight brought the layer."""
    registry.push("shared", "1", random_image(int.from_bytes(secrets.token_bytes(4)), layers=1))
    silence = Hang()
    with registry_fault_proxy(registry.url) as proxy, ThreadPoolExecutor(2) as commands:
        image = f"{proxy.url.removeprefix('http://')}/shared:1"
        traced.cli("pull", image)
        proxy.script(silence, of=blobs, times=None)
        collector.spans.clear()
        one = commands.submit(traced.cli, "extract", image, "--node", "n0")
        assert silence.arrived.wait(60)
        two = commands.submit(traced.cli, "extract", image, "--node", "n1")
        asyncio.run(_await_waiter(traced))
        silence.proceed.set()
        one.result()
        two.result()

    roles = {"owner", "waiter"}
    spans = collector.wait(lambda spans: {s.attributes.get("lazyfarm.flight.role") for s in spans} >= roles)
    by_role = {span.attributes["lazyfarm.flight.role"]: span for span in spans if span.name == "flight"}
    assert by_role["waiter"].links == (by_role["owner"].id,)
    assert by_role["waiter"].trace != by_role["owner"].trace
    assert by_role["waiter"].instance != by_role["owner"].instance


async def _await_waiter(farm: RunningFarm) -> None:
    """Wait until somebody waits for a flight."""
    config = farm.settings.config
    link = connect(config.redis)
    flights = RedisFlightStore(link, Keys(config.farm.name))
    try:
        async with asyncio.timeout(60):
            while not any(flight["waiters"] for flight in (await flights.under_way()).values()):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    finally:
        await link.close()


def test_a_farm_whose_collector_is_away_builds_as_ever(traced, collector, registry, tmp_path):
    """The build is fine, and says nothing of it; each process's log has one line."""
    registry.push("base", "2", shell_image(secrets.token_hex(8)))
    collector.is_down = True
    done = traced.cli("build", _dockerfile(tmp_path / "context", f"{registry.host}/base:2"))

    assert "trace" not in (done.stdout + done.stderr).lower()
    for name in ("cli.log", "solver-scheduler-*.jsonl", "fetch-worker-*.jsonl", "op-worker-*.jsonl"):
        _await_line(traced.state_dir / "logs", name, "traces.lost")


def _await_line(logs: Path, pattern: str, event: str) -> None:
    """Wait until one of the logs has a line, and see that each has at most one."""
    until_s = time.monotonic() + 60
    while True:
        counts = {path.name: path.read_text().count(f'"{event}"') for path in logs.glob(pattern)}
        assert max(counts.values()) <= 1, counts
        if any(counts.values()):
            return
        assert time.monotonic() < until_s, counts
        time.sleep(0.1)
