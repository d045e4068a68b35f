"""What a call moved, and what it did not have to."""

from cluster.digest import digest_of
from cluster.messages import LayerFetch, LayerPush
from cluster.ref import RefState
from cluster.traffic import Traffic, fetch_traffic, push_traffic
from tests.doubles.collect import chain

NAMES = ("fetched", "present", "joined", "unpacked")
CHAIN = [RefState(record=record, present=None, providers=()) for record in chain(*NAMES)]
D = {name: state.record.blob.digest for name, state in zip(NAMES, CHAIN, strict=True)}


def fetch(name, source, *, bytes_fetched=0, joined=False):
    return LayerFetch(digest=D[name], source=source, bytes_fetched=bytes_fetched, seconds=0.1, joined=joined)


def test_what_was_there_or_came_by_another_was_not_fetched():
    """What was unpacked on the node already needed no bytes at all, and counts as nothing."""
    layers = [
        fetch("fetched", "r.example/a", bytes_fetched=130),
        fetch("present", "present"),
        fetch("joined", "r.example/a", joined=True),
        fetch("unpacked", "snapshot"),
    ]
    assert fetch_traffic(layers, CHAIN) == Traffic(fetched_bytes=130, not_fetched_bytes=200, joined=1)


def test_what_the_registry_had_or_mounted_was_not_pushed():
    """A foreign layer never would have been."""
    hows = ("exists", "mounted", "uploaded", "foreign")
    layers = [LayerPush(digest=D[n], how=h, bytes=100 * (h == "uploaded")) for n, h in zip(NAMES, hows, strict=True)]
    assert push_traffic(layers, CHAIN) == Traffic(pushed_bytes=100, not_pushed_bytes=200)


def test_figures_add_up_and_survive_a_later_release():
    """Figures of 0 are not told; those that are unknown here are left out."""
    both = Traffic(joined=1, fetched_bytes=2) + Traffic(joined=2, not_pushed_bytes=3, not_fetched_bytes=4)
    assert both.figures == {"joined": 3, "fetched_bytes": 2, "not_pushed_bytes": 3, "not_fetched_bytes": 4}
    assert Traffic.of_figures({**both.figures, "later": 5}) == both
    assert both.avoided_bytes == 7


def test_a_layer_of_another_chain_counts_for_nothing():
    """Its size is not known."""
    strange = LayerFetch(digest=digest_of(b"?"), source="present", bytes_fetched=0, seconds=0.0, joined=False)
    assert fetch_traffic([strange], CHAIN) == Traffic()
