"""No test leaves this process joined: the next one may end the cluster, and a driver of a dead one spins."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors.join import leave


@pytest.fixture(autouse=True)
def _left() -> Iterator[None]:
    """Leave the farm's cluster after each test."""
    yield
    leave()
