"""A few rounds of what ``make soak`` does for as long as one likes."""

from __future__ import annotations

import itertools
import os

import pytest

from cluster.config import S3Config
from tests.doubles.faults import BrokenFarm
from tests.soak.schedule import rounds
from tests.soak.soak import Soak

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.s3,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers, cgroups and the packet filter need root"),
]


async def test_a_farm_that_is_broken_at_random_is_whole_after_each_round(lab: BrokenFarm, swift_s3: S3Config):
    """Every call ends well, or with a typed error and well when it is made again; the checker finds nothing."""
    soak = Soak(lab, swift_s3)
    for wanted in itertools.islice(rounds(7), 2):
        await soak.play(wanted)
    assert soak.harms > 1
