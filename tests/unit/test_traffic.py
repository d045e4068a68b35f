"""What a call moved, and what it did not have to."""

from dataclasses import replace

from cluster.digest import digest_of
from cluster.messages import LayerFetch, LayerPush
from cluster.provider import FARM, ProviderHandle
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
    fetched = Traffic(fetched_bytes=130)
    assert fetch_traffic(layers, CHAIN) == Traffic(
        fetched_bytes=130, not_fetched_bytes=200, joined=1, registries={"r.example": fetched}
    )


def test_what_was_not_fetched_counts_for_the_registry_that_would_have_been_asked():
    """For none where there are several; a layer that was made here has nobody to ask, and who joined needn't know."""
    one, other = (ProviderHandle(registry=f"{name}.example", repository="a") for name in ("one", "other"))
    providers = {"present": (one, FARM), "joined": (one,), "unpacked": (one,), "fetched": (one, other)}
    states = [replace(state, providers=providers[name]) for name, state in zip(NAMES, CHAIN, strict=True)]
    layers = [
        fetch("fetched", "present"),
        fetch("present", "present"),
        fetch("joined", "flight of n1/x", joined=True),
        fetch("unpacked", "snapshot"),
    ]
    found = fetch_traffic(layers, states)
    assert found.registries == {"one.example": Traffic(not_fetched_bytes=200, joined=1)}
    assert (found.not_fetched_bytes, found.joined) == (300, 1)


def test_a_bucket_of_caches_is_no_registry():
    """What it gave counts in all."""
    assert fetch_traffic([fetch("fetched", "s3/bucket/prefix", bytes_fetched=130)], CHAIN) == Traffic(fetched_bytes=130)


def test_what_the_registry_had_or_mounted_was_not_pushed():
    """A foreign layer never would have been."""
    hows = ("exists", "mounted", "uploaded", "foreign")
    layers = [LayerPush(digest=D[n], how=h, bytes=100 * (h == "uploaded")) for n, h in zip(NAMES, hows, strict=True)]
    figures = {"pushed_bytes": 100, "not_pushed_bytes": 200}
    found = push_traffic(layers, CHAIN, "r.example:5000")
    assert found == Traffic(**figures, registries={"r.example:5000": Traffic(**figures)})
    assert push_traffic([], CHAIN, "r.example").registries == {}


def test_figures_add_up_and_survive_a_later_release():
    """Figures of 0 are not told; those that are unknown here are left out."""
    both = Traffic(joined=1, fetched_bytes=2) + Traffic(joined=2, not_pushed_bytes=3, not_fetched_bytes=4)
    assert both.figures == {"joined": 3, "fetched_bytes": 2, "not_pushed_bytes": 3, "not_fetched_bytes": 4}
    assert Traffic.of_figures({**both.figures, "later": 5}) == both
    assert both.avoided_bytes == 7


def test_registries_add_up_apart_and_an_earlier_release_leaves_them_out():
    """Their figures are names that it doesn't know; what it told itself has none."""
    one = Traffic(joined=1, registries={"a.example:5000": Traffic(joined=1)})
    other = Traffic(joined=2, registries={"a.example:5000": Traffic(joined=1), "b.example": Traffic(joined=1)})
    both = one + other + Traffic(joined=4)
    assert both.figures == {"joined": 7, "joined a.example:5000": 2, "joined b.example": 1}
    assert Traffic.of_figures({**both.figures, "later a.example": 5}) == both
    assert Traffic.of_figures({"fetched_bytes": 7}) == Traffic(fetched_bytes=7)


def test_a_layer_of_another_chain_counts_for_nothing():
    """Its size is not known."""
    strange = LayerFetch(digest=digest_of(b"?"), source="present", bytes_fetched=0, seconds=0.0, joined=False)
    assert fetch_traffic([strange], CHAIN) == Traffic()
