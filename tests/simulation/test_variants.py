"""Broken variants: each is found by the invariant that it breaks, within a stated number of seeds."""

from __future__ import annotations

import dataclasses

import pytest

from tests.simulation import broken
from tests.simulation.builds import ClaimNotChecked
from tests.simulation.caches import LeaseNotChecked
from tests.simulation.collection import HoldersNotChecked
from tests.simulation.farm import Parts
from tests.simulation.seeds import build_of, cache_of, collection_of, pull_of

#: What is put in, the runs that it is put into, the invariant that finds it, and within how many seeds.
PULLS = [
    (Parts(flights=broken.FenceNotChecked), "pauses", "I10", 5),
    (Parts(renewer=broken.RenewalStopped), "slow", "I1", 5),
    (Parts(flights=broken.ReleasedByTimeout), "calm", "I5", 5),
    (Parts(transfers=broken.SharedUploadKey), "late bucket", "I2", 40),
    (Parts(transfers=broken.CommitBeforeHash), "wrong bytes", "I2", 5),
    (Parts(flights=broken.ErrorInherited), "refusals", "I6", 5),
    (Parts(unlazier=broken.FirstLeaseUsed), "calm", "I3", 5),
]


def _variant(value):
    """Name a case by what is broken in it."""
    if isinstance(value, Parts):
        return next(part.__name__ for part in dataclasses.astuple(value) if part.__module__ == broken.__name__)
    return str(value)


def _found(make, name, seeds):
    """Return the first seed whose run breaks the invariant *name*."""
    for seed in range(seeds):
        run = make(seed)
        run.run()
        if any(violation.name == name for violation in run.farm.watch.violations):
            return seed
    return None


@pytest.mark.parametrize(("parts", "runs", "name", "seeds"), PULLS, ids=_variant)
def test_a_broken_pull_is_found(parts, runs, name, seeds):
    """What leaves one thing out breaks the invariant that this is for; the same seeds break nothing without it."""
    assert _found(lambda seed: pull_of(runs, seed, parts), name, seeds) is not None
    assert _found(lambda seed: pull_of(runs, seed), name, seeds) is None


def test_a_collection_that_asks_for_no_holders_is_found():
    """What is collected under a live lease breaks I3; the same seeds collect, and break nothing, with the check."""
    assert _found(lambda seed: collection_of("calm", seed, HoldersNotChecked), "I3", 5) is not None
    assert _found(lambda seed: collection_of("calm", seed), "I3", 5) is None


def test_a_blob_that_is_held_after_it_was_seen_is_found():
    """What is collected between a look and the hold is missing under the lease of who was told that he has it: I3."""
    parts = Parts(unlazier=broken.SeenAndThenHeld)
    assert _found(lambda seed: collection_of("slow messages", seed, parts=parts), "I3", 60) is not None
    assert _found(lambda seed: collection_of("slow messages", seed), "I3", 60) is None


def test_a_job_ended_by_a_stale_scheduler_is_found():
    """A scheduler that was stopped for longer than its claim lives ends a job that another has by then: I10."""
    assert _found(lambda seed: build_of("pauses", seed, job_store=ClaimNotChecked), "I10", 60) is not None


def test_refs_under_a_lapsed_lease_are_found():
    """A driver that was stopped for longer than its lease lives is given refs under it: I10."""
    assert _found(lambda seed: cache_of("stops", seed, refs=LeaseNotChecked), "I10", 5) is not None
