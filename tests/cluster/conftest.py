"""No test leaves this process joined, nor anything behind on the farm that all share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from actors.join import leave
from storage.blobs import S3ContentStore
from tests.doubles.checker import CheckedFarm
from tests.doubles.farm import RunningFarm


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


async def _check(farm: RunningFarm) -> None:
    store = S3ContentStore(farm.settings.config.s3)
    try:
        checked = CheckedFarm(running=farm, store=store)
        await checked.assert_nothing_left()
        await checked.assert_consistent()
    finally:
        store.close()
