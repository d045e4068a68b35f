"""Remote caches of random graphs: what comes back, and what bytes can do."""

import json

from hypothesis import given
from hypothesis import strategies as st

from cluster import wire
from cluster.descriptor import MANIFEST_OCI
from cluster.digest import digest_of
from cluster.errors import RegistryError
from cluster.image import parse_manifest
from cluster.remote_cache import CacheEntry, RemoteCache, decode, embed, encode, extract
from tests.doubles.fetch import layer_of

LAYERS = st.sampled_from([layer_of(bytes([n])) for n in range(5)])
ENTRIES = st.builds(
    CacheEntry,
    keys=st.lists(st.integers(0, 20).map(lambda n: digest_of(bytes([n]))), min_size=1, max_size=3, unique=True).map(
        tuple
    ),
    layers=st.lists(LAYERS, max_size=6).map(tuple),
    config=st.none() | st.sampled_from([b"{}", b'{"config":{}}']),
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)
)


def found_in(cache):
    """Return what is found under each key."""
    found = {}
    for number in range(len(cache.entries)):
        entry = cache.entry(number)
        for key in entry.keys:
            found.setdefault(key, set()).add((tuple(layer.digest for layer in entry.layers), entry.config))
    return found


@given(st.lists(ENTRIES, max_size=12))
def test_every_result_is_found_under_its_keys(entries):
    """Whatever is shared between chains and entries: after a registry, and after a payload."""
    expected = {}
    for entry in entries:
        for key in entry.keys:
            expected.setdefault(key, set()).add((tuple(layer.digest for layer in entry.layers), entry.config))
    cache = RemoteCache.of(entries)
    stored = encode(cache, "c")
    assert found_in(decode(parse_manifest(stored.manifest, MANIFEST_OCI, "c"), stored.config, "c")) == expected
    assert found_in(wire.decode("cache", RemoteCache, wire.encode("cache", cache))) == expected


@given(st.lists(LAYERS, max_size=5), st.lists(ENTRIES, max_size=6))
def test_an_inline_cache_has_what_the_image_has(layers, entries):
    """Exactly the results that are its lowest layers."""
    inside = [entry for entry in entries if list(entry.layers) == layers[: len(entry.layers)]]
    data = embed(b"{}", layers, entries)
    if inside:
        assert found_in(extract(data, layers, "image")) == found_in(RemoteCache.of(inside))
    else:
        assert json.loads(data) == {}


@given(st.lists(ENTRIES, min_size=1, max_size=4), st.data())
def test_a_damaged_cache_is_refused_or_read_but_never_worse(entries, data):
    """A typed error, or a cache whose every chain ends: no other exception, no endless walk."""
    stored = encode(RemoteCache.of(entries), "c")
    document = json.loads(stored.config)
    key = data.draw(st.sampled_from(sorted(document)))
    document[key] = data.draw(VALUES | st.lists(st.lists(st.integers(-2, 5) | st.none(), max_size=3), max_size=5))
    try:
        cache = decode(parse_manifest(stored.manifest, MANIFEST_OCI, "c"), json.dumps(document).encode(), "c")
    except RegistryError:
        return
    found_in(cache)
    cache.ref_ids()


@given(st.lists(ENTRIES, min_size=1, max_size=4), st.data())
def test_bytes_are_never_taken_for_more_than_they_are(entries, data):
    """Cut off or overwritten anywhere: as above."""
    stored = encode(RemoteCache.of(entries), "c")
    at = data.draw(st.integers(0, len(stored.config) - 1))
    damaged = stored.config[:at] + data.draw(st.binary(max_size=3))
    if data.draw(st.booleans()):
        damaged += stored.config[at + 1 :]
    try:
        found_in(decode(parse_manifest(stored.manifest, MANIFEST_OCI, "c"), damaged, "c"))
    except RegistryError:
        return
