"""Every fault point is a promise; one that no test passes is none."""

from __future__ import annotations

import pytest

from cluster.faultpoints import FaultPoint
from storage.faults import never_hit
from tests.doubles.faults import BrokenFarm

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.s3]

#: Where somebody is killed at each.
_MODULES = {"test_killed_owner.py", "test_killed_builder.py", "test_killed_collector.py", "test_killed_verifier.py"}


def test_every_fault_point_was_passed(lab: BrokenFarm, request: pytest.FixtureRequest):
    """A point in the list that nothing passes is a step that nobody ever interrupted."""
    # One for each, and more.
    if sum(item.path.name in _MODULES for item in request.session.items) < len(FaultPoint):
        pytest.skip("not all of the tests that pass them are part of this run")
    assert never_hit(lab.faults.hits) == []
