"""One farm for all fault tests: each breaks something, and finds it whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from cluster.config import S3Config
from storage.blobs import S3ContentStore
from tests.doubles.faults import BrokenFarm, broken_farm


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Bound each test by itself: the first one's setup brings a farm up."""
    for item in items:
        if item.path.parent.name == "faults":
            item.add_marker(pytest.mark.timeout(100, func_only=True))
