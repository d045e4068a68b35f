"""A thousand seeds: whatever happens to nodes, messages and stores, no invariant is broken."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

import pytest

from tests.simulation.pulls import digest_of_trace
from tests.simulation.seeds import BUILDS, CACHES, COLLECTIONS, PULLS, build_of, cache_of, collection_of, pull_of

#: Seeds of each: 400 pulls, 150 with collection, 240 builds, 240 caches.
_PULLS, _COLLECTIONS, _BUILDS, _CACHES = 40, 50, 60, 60
_RUNS = [
    *(pytest.param(partial(pull_of, name), _PULLS, id=f"pull, {name}") for name in PULLS),
    *(pytest.param(partial(collection_of, name), _COLLECTIONS, id=f"collection, {name}") for name in COLLECTIONS),
    *(pytest.param(partial(build_of, name), _BUILDS, id=f"build, {name}") for name in BUILDS),
    *(pytest.param(partial(cache_of, name), _CACHES, id=f"cache, {name}") for name in CACHES),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "seeds"), _RUNS)
def test_no_seed_breaks_an_invariant(make, seeds):
    """I1 to I7, I9 and I10 hold in every run."""
    for seed in range(seeds):
        run = make(seed)
        run.run()
        assert run.farm.watch.violations == [], f"seed {seed}"


@pytest.mark.slow
def test_faults_are_met():
    """The seeds are worth their time: owners die under those who wait, and somebody takes over within a lease."""
    take_overs_s = []
    for seed in range(_PULLS):
        run = pull_of("crashes", seed)
        run.run()
        take_overs_s += run.farm.watch.take_overs_s

    assert len(take_overs_s) >= _PULLS


_REPLAY = """
from tests.simulation.pulls import digest_of_trace
from tests.simulation.seeds import pull_of
run = pull_of("everything", 7)
run.run()
print(digest_of_trace(run))
"""


def test_a_seed_is_one_run():
    """Two runs of a seed, in other processes too, send the same messages at the same times; of two seeds, others."""
    run, other = pull_of("everything", 7), pull_of("everything", 8)
    run.run()
    other.run()
    again = subprocess.run(
        [sys.executable, "-c", _REPLAY], env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, check=True
    )

    assert again.stdout.decode().split()[-1] == digest_of_trace(run) != digest_of_trace(other)
