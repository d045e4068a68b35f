"""Origins: one text for what something was made of, and what is kept of several."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.digest import digest_of
from cluster.errors import MalformedPayloadError
from cluster.origin import MAX_ORIGINS, OPEN, Needed, decode_origin, encode_origin, merge_origins
from cluster.provider import ProviderHandle
from tests.doubles.fetch import handle

PLACES = [handle("app"), handle("lib"), handle("app", "mirror.example")]

needed = st.builds(
    Needed,
    digest=st.integers(0, 20).map(lambda n: digest_of(b"%d" % n)),
    size_bytes=st.integers(0, 2**53),
    providers=st.lists(st.sampled_from(PLACES), unique=True).map(tuple),
    came_from=st.sampled_from(["", *(place.source for place in PLACES)]),
)


@given(st.lists(needed, unique_by=lambda need: need.digest))
def test_a_text_says_all_that_was_needed(needs):
    """Each blob with its size and places, and where its bytes came from; in whatever order they were given."""
    text = encode_origin(needs)
    told = {need.digest: replace(need, providers=tuple(sorted(need.providers))) for need in decode_origin(text)}
    assert told == {need.digest: replace(need, providers=tuple(sorted(need.providers))) for need in needs}
    assert encode_origin(reversed(needs)) == text == encode_origin(decode_origin(text))
    assert (text == OPEN) == (not needs)


def test_an_images_layers_share_what_is_said_of_their_place():
    """What 60 layers cost is their digests: records are read at every look-up."""
    needs = [
        Needed(digest=digest_of(b"%d" % n), size_bytes=10**8, providers=(PLACES[0],), came_from=PLACES[0].source)
        for n in range(60)
    ]
    assert len(encode_origin(needs)) < 60 * 90 + 300


def test_where_the_bytes_came_from_is_kept_whatever_else_is():
    """A blob that is in very many places is said to be in some; the one whose manifests are believed is among these."""
    places = tuple(ProviderHandle(registry=f"r{n:03}.example", repository="app") for n in range(300))
    need = Needed(digest=digest_of(b""), size_bytes=0, providers=places, came_from=places[-1].source)
    (told,) = decode_origin(encode_origin([need]))
    assert told.providers[0] == places[-1]
    assert len(told.providers) < 10


@pytest.mark.parametrize("text", ["[", "{}", "[{}]", '[{"came_from":"","providers":[],"blobs":[1]}]', "\udcff"])
def test_a_text_that_is_none_is_a_typed_error(text):
    """Whoever writes to Redis gets nothing opened by it."""
    with pytest.raises(MalformedPayloadError):
        decode_origin(text)


@given(st.lists(st.lists(st.sampled_from([f"o{n}" for n in range(30)] + [OPEN]), max_size=4), max_size=30))
def test_the_newest_origins_are_kept(batches):
    """Each once and not for ever more; what is once open to all stays so."""
    kept: tuple[str, ...] = ()
    for added in batches:
        kept = merge_origins(kept, added)
        assert len(set(kept)) == len(kept) <= MAX_ORIGINS
        assert kept[: len(set(added))] == tuple(dict.fromkeys(added)) or kept == (OPEN,)
    assert (kept == (OPEN,)) == any(OPEN in added for added in batches)
