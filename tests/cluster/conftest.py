"""No test leaves this process joined, nor anything behind on the farm that all share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.join import leave
from storage.blobs import S3ContentStore
from tests.doubles.checker import CheckedFarm
from tests.doubles.farm import RunningFarm
from tests.doubles.gateway import Gateway
from tests.doubles.registry import make_authority


@pytest.fixture(autouse=True)
def _left() -> Iterator[None]:
    """Leave the farm's cluster after each test: the next one may end it, and a driver of a dead one spins."""
    yield
    leave()


@pytest.fixture(autouse=True)
def _whole(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check the farm that all share after each test that uses it: whole, and nothing left of what is over."""
    # Asked for first, so that what the test itself has is given back by then.
    farm: RunningFarm | None = request.getfixturevalue("farm") if "farm" in request.fixturenames else None
    yield
    if farm is not None:
        asyncio.run(_check(farm))


@pytest.fixture
def gateway(farm: RunningFarm, tmp_path: Path) -> Iterator[Gateway]:
    """A gateway of the farm that all share."""
    made = Gateway(farm, make_authority(tmp_path))
    made.start()
    yield made
    made.end()


async def _check(farm: RunningFarm) -> None:
    store = S3ContentStore(farm.settings.config.s3)
    try:
        checked = CheckedFarm(running=farm, store=store)
        await checked.assert_nothing_left()
        await checked.assert_consistent()
    finally:
        store.close()
