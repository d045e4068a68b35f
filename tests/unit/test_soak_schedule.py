"""What a soak does comes from its seed alone."""

from __future__ import annotations

import itertools

from tests.soak.schedule import rounds


def _first(seed, count):
    return list(itertools.islice(rounds(seed), count))


def test_a_seed_is_replayed():
    """The same seed gives the same rounds, however many of them are looked at; another one gives others."""
    assert _first(7, 20) == _first(7, 40)[:20]
    assert _first(7, 3) != _first(8, 3)


def test_every_round_has_work_and_some_have_harm():
    """Quiet rounds are there, too: what holds only when something breaks would not be seen."""
    found = _first(1, 50)
    assert all(each.works for each in found)
    assert any(each.harms for each in found)
    assert any(not each.harms for each in found)
