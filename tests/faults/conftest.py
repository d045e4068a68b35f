"""One farm for all fault tests: each breaks something, and finds it whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import S3Config
from lazyfarm.settings import load_settings
from storage.blobs import S3ContentStore
from tests.doubles.builds import BuildFarm
from tests.doubles.farm import FAST, RunningFarm, running_farm
from tests.doubles.faults import BrokenFarm, broken_farm
from tests.doubles.registry import Registry
from tests.doubles.shell_image import shell_image


@pytest.fixture(scope="package")
def broken(swift_s3: S3Config) -> Iterator[BrokenFarm]:
    """A farm of three nodes behind proxies, with a switch for every fault point."""
    s3 = replace(swift_s3, bucket="faults")
    store = S3ContentStore(s3)
    store.ensure_bucket()
    store.close()
    with broken_farm(s3) as farm:
        yield farm


@pytest.fixture
def lab(broken: BrokenFarm) -> Iterator[BrokenFarm]:
    """That farm, counting from now, with nothing armed."""
    broken.heal()
    yield broken
    broken.heal()


@pytest.fixture(scope="package")
def running_builds() -> Iterator[BuildFarm]:
    """A farm of three nodes and two schedulers, each of which soon misses the other.

    ``LAZYFARM_TEST_BUILDS=DIR`` uses one that runs there and leaves it running: for who works on tests.
    """
    environ = {
        **FAST,
        "LAZYFARM__BUILD__SCHEDULERS": "2",
        "LAZYFARM__BUILD__CLAIM_TTL_S": "2",
        "LAZYFARM__CACHE__LEASE_TTL_S": "8",
    }
    if root := os.environ.get("LAZYFARM_TEST_BUILDS"):
        settings = load_settings(Path(root), None, environ)
        yield BuildFarm(running=RunningFarm(state_dir=Path(root), settings=settings, environ=environ))
        return
    with running_farm(nodes=3, environ=environ) as running:
        yield BuildFarm(running=running)


@pytest.fixture
async def builds(running_builds: BuildFarm) -> AsyncIterator[BuildFarm]:
    """That farm; what a test does there leaves nothing."""
    yield running_builds
    await running_builds.assert_nothing_left()


@pytest.fixture
def base(registry: Registry) -> str:
    """Push an image with a shell that no farm has seen; return its name."""
    registry.push("base", "1", shell_image(secrets.token_hex(8)))
    registry.forget()
    return f"{registry.host}/base:1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bound each test by itself: the first one's setup brings a farm up."""
    for item in items:
        if item.path.parent.name == "faults":
            item.add_marker(pytest.mark.timeout(100, func_only=True))
