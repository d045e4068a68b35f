"""Ray's GCS keeps its state in a Redis: the head is killed and comes back, and the farm goes on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator

import pytest

from storage.services.process import FARM_MARK, SERVICE_MARK, marked_pids
from storage.services.state_dir import StateDir
from tests.doubles.farm import FAST, RunningFarm, running_farm
from tests.doubles.faults import MIB, assert_extracted, eventually
from tests.doubles.observed import ObservedFarm
from tests.doubles.redis import RedisServer, redis_binaries, redis_server
from tests.doubles.registry import build_image, build_layer, docker_registry
from tests.doubles.registry_faults import registry_fault_proxy

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]


@pytest.fixture
def gcs_redis() -> Iterator[RedisServer]:
    """A Redis for nothing but Ray's state."""
    with redis_server(next(iter(redis_binaries().values())), "--appendonly", "yes") as server:
        yield server


@pytest.fixture
def kept(gcs_redis: RedisServer) -> Iterator[RunningFarm]:
    """A farm of two nodes whose head may come back."""
    environ = {
        **FAST,
        "LAZYFARM__RAY__GCS_REDIS": f"redis://127.0.0.1:{gcs_redis.port}",
        "LAZYFARM__RAY__DASHBOARD": "false",
    }
    with running_farm(nodes=2, environ=environ) as farm:
        yield farm


@pytest.mark.timeout(180, func_only=True)
async def test_the_farm_outlives_its_head(gcs_redis: RedisServer, kept: RunningFarm):
    """The head's node and the GCS are killed while another node pulls: that ends well, and `up` brings the head back.

    What ran on the other node runs on, and who comes then finds all of it. `down` leaves no key.
    """
    observed = ObservedFarm(running=kept)
    dice = os.urandom(10 * MIB)
    image = build_image([build_layer({"data": dice}, compression="zstd")], label="gcs")
    with docker_registry() as registry, registry_fault_proxy(registry.url) as proxy:
        registry.push("app", "one", image)
        driver = await kept.connect()
        try:
            ref = await driver.pull(f"{proxy.host}/app:one", plain_http=True)
            before = {actor.name: actor.pid for actor in await observed.actors() if actor.node == "n1"}
            proxy.bytes_per_s = 2 * MIB
            pulling = asyncio.ensure_future(ref.extract("n1"))
            await eventually(lambda: proxy.blob_bytes[image.layers[0].digest] > 2 * MIB, "two MiB")

            mark = StateDir(kept.state_dir).farm_id()
            for pid in marked_pids({FARM_MARK: mark, SERVICE_MARK: "ray-n0"}):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            proxy.bytes_per_s = None
            assert_extracted((await pulling).path, image)
        finally:
            await driver.close()
        told = await asyncio.to_thread(kept.cli, "up", timeout_s=150)

        assert "stopped ray-n1" not in told.stdout
        after = {actor.name: actor.pid for actor in await observed.actors() if actor.node == "n1"}
        assert before.items() <= after.items()
        extracted = await asyncio.to_thread(kept.cli_json, "extract", ref.id, "--node", "n0")
        assert_extracted(extracted["nodes"][0]["path"], image)
    await asyncio.to_thread(kept.cli, "down")
    with contextlib.closing(gcs_redis.link()) as link:
        assert link.execute("KEYS", "RAY*") == []
