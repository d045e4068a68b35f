"""``make simulate``: says what a run took, and fails where an invariant is broken, with the way to see it again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.simulation import __main__ as command
from tests.simulation import broken
from tests.simulation.farm import Farm, Parts

_SMALL = ["--nodes", "6", "--layers", "3", "--seed", "4"]


@pytest.mark.parametrize("options", [[], ["--calm"]])
def test_a_sound_run_is_reported(capsys, options):
    """All figures are there, and the exit status is 0."""
    assert command.main([*_SMALL, *options]) == 0

    told = capsys.readouterr().out
    for name in ("duplicate factor", "bytes from the registry", "time to the last node", "take-overs", "busiest key"):
        assert name in told
    assert "violations                   0" in told


def test_a_broken_run_says_how_to_see_it_again(capsys, monkeypatch):
    """The exit status is 1; what is broken is named, and the command that shows it is printed."""

    def broken_pull(*args, **kwargs):
        run = sound_pull(*args, **kwargs)
        farm = run.farm
        parts = Parts(unlazier=broken.FirstLeaseUsed)
        made = Farm(seed=farm.seed, machines=farm.machines, links=farm.links, weather=farm.weather, parts=parts)
        return replace(run, farm=made)

    sound_pull = command.pull
    monkeypatch.setattr(command, "pull", broken_pull)

    assert command.main([*_SMALL, "--calm"]) == 1

    told = capsys.readouterr().out
    assert "BROKEN I3" in told
    assert told.splitlines()[-1] == "again: python -m tests.simulation --nodes 6 --layers 3 --seed 4 --calm"
