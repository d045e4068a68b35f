"""One farm for all fault tests: each breaks something, and finds it whole."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.config import S3Config
from storage.blobs import S3ContentStore
from tests.doubles.builds import BuildFarm
from tests.doubles.faults import BrokenFarm, broken_farm
from tests.doubles.shell_image import shell_image
from tests.faults.report import FaultsReport


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


@pytest.fixture
async def builds(lab: BrokenFarm) -> AsyncIterator[BuildFarm]:
    """That farm as one that builds; what a test does there leaves nothing."""
    builds = BuildFarm(running=lab.running)
    yield builds
    await builds.assert_nothing_left()


@pytest.fixture
def base(lab: BrokenFarm) -> str:
    """Push an image with a shell that the farm has not seen; return its name at the proxy."""
    tag = secrets.token_hex(8)
    lab.registry.push("shell", tag, shell_image(tag))
    return f"{lab.proxy.host}/shell:{tag}"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let ``make faults`` say where its page is."""
    parser.addoption("--faults-report", type=Path, metavar="FILE", help="write what came of the run there")


def pytest_configure(config: pytest.Config) -> None:
    """Have the page written, where it is asked for."""
    file = config.getoption("--faults-report", default=None)
    if file is not None:
        config.pluginmanager.register(FaultsReport(file, config.cache))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bound each test by itself: the first one's setup brings a farm up."""
    for item in items:
        if item.path.parent.name == "faults":
            item.add_marker(pytest.mark.timeout(100, func_only=True))
