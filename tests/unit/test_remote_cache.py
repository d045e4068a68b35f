"""A remote cache as it is stored: what comes back, and what is refused."""

import base64
import json

import pytest

from cluster import wire
from cluster.cache_options import CacheMode
from cluster.descriptor import CONFIG_OCI, MANIFEST_OCI
from cluster.digest import digest_of
from cluster.errors import (
    CacheTooLargeError,
    MalformedCacheError,
    MalformedManifestError,
    MalformedPayloadError,
    NotACacheError,
)
from cluster.image import parse_manifest
from cluster.ref import RefId, RefRecord
from cluster.remote_cache import (
    CACHE_CONFIG,
    INLINE_KEY,
    CachedNode,
    CacheEntry,
    CacheNode,
    ExportCandidate,
    RemoteCache,
    decode,
    embed,
    encode,
    extract,
    read_cache,
    select,
)
from tests.doubles.fetch import layer_of

A, B, C = layer_of(b"A"), layer_of(b"B"), layer_of(b"C")
K1, K2, K3 = (digest_of(f"key {n}".encode()) for n in range(3))
IMAGE = {"architecture": "amd64", "os": "linux", "config": {"Env": ["A=b"]}}
CONFIG = json.dumps(IMAGE).encode()
ENTRIES = (
    CacheEntry(keys=(K1,), layers=(A,), config=CONFIG),
    CacheEntry(keys=(K2, K3), layers=(A, B)),
)


def entries_of(cache):
    return tuple(cache.entry(number) for number in range(len(cache.entries)))


def document_of(**changes):
    good = json.loads(encode(RemoteCache.of(ENTRIES), "c").config)
    return json.dumps({**good, **changes}).encode()


def decoded(config, *, layers=(A, B), media_type=CACHE_CONFIG):
    """Decode a manifest over *config*, as it would be read."""
    stored = json.loads(encode(RemoteCache.of([CacheEntry(keys=(K1,), layers=layers)]), "c").manifest)
    stored["config"] = {"mediaType": media_type, "digest": digest_of(config), "size": len(config)}
    return decode(parse_manifest(json.dumps(stored).encode(), MANIFEST_OCI, "c"), config, "c")


# -- a cache of its own -------------------------------------------------------------------------------------------


def test_what_is_encoded_comes_back():
    """Keys, chains with diff IDs, image configs; and twice the same bytes."""
    stored = encode(RemoteCache.of(ENTRIES), "c")
    back = decode(parse_manifest(stored.manifest, MANIFEST_OCI, "c"), stored.config, "c")
    assert entries_of(back) == ENTRIES
    assert encode(back, "c") == stored


def test_the_manifest_is_an_image_manifest_with_each_layer_once():
    """So that any registry keeps it and its layers; diff IDs are where BuildKit and containerd have them."""
    stored = encode(RemoteCache.of([*ENTRIES, CacheEntry(keys=(K3,), layers=(B, A))]), "c")
    document = json.loads(stored.manifest)
    assert document["mediaType"] == MANIFEST_OCI
    assert document["config"]["mediaType"] == CACHE_CONFIG
    assert [layer["digest"] for layer in document["layers"]] == [A.digest, B.digest]
    assert document["layers"][0]["annotations"] == {"containerd.io/uncompressed": A.diff_id}


def test_docker_layers_are_ocis_in_an_oci_manifest():
    """A registry would look for a foreign layer under Docker's media type, and not find it."""
    foreign = layer_of(
        b"W", media_type="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", urls=("https://w.example/1",)
    )
    docker = layer_of(b"D", media_type="application/vnd.docker.image.rootfs.diff.tar.gzip")
    document = json.loads(encode(RemoteCache.of([CacheEntry(keys=(K1,), layers=(foreign, docker))]), "c").manifest)
    assert [layer["mediaType"] for layer in document["layers"]] == [
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.oci.image.layer.v1.tar+gzip",
    ]
    assert document["layers"][0]["urls"] == ["https://w.example/1"]


def test_a_cache_of_a_deep_graph_is_as_large_as_the_graph():
    """Each vertex adds its layer and one node, not its whole chain."""
    chain = [layer_of(str(n).encode()) for n in range(400)]
    sizes = []
    for depth in (200, 400):
        entries = [CacheEntry(keys=(K1,), layers=tuple(chain[:n])) for n in range(1, depth + 1)]
        stored = encode(RemoteCache.of(entries), "c")
        sizes.append(len(stored.manifest) + len(stored.config))
    assert sizes[1] < 2.1 * sizes[0]


def test_results_that_are_equal_are_one_entry():
    """Under the keys of all."""
    cache = RemoteCache.of([CacheEntry(keys=(K1,), layers=(A,)), CacheEntry(keys=(K2, K1), layers=(A,))])
    assert entries_of(cache) == (CacheEntry(keys=(K1, K2), layers=(A,)),)


def test_an_empty_filesystem_is_a_result():
    """With no layers at all; and a cache may hold nothing."""
    scratch = (CacheEntry(keys=(K1,), layers=()),)
    stored = encode(RemoteCache.of(scratch), "c")
    assert entries_of(decode(parse_manifest(stored.manifest, MANIFEST_OCI, "c"), stored.config, "c")) == scratch
    assert RemoteCache.of([CacheEntry(keys=(), layers=(A,))]).entries == ()


def test_nodes_are_the_refs_that_their_layers_would_be():
    """By blob chain ID, as the cache manager names them."""
    below = RefRecord.over(A, None)
    assert RemoteCache.of(ENTRIES).ref_ids() == [below.id, RefRecord.over(B, below).id]


@pytest.mark.parametrize(
    "changes",
    [
        {"nodes": [[0, 0]]},
        {"nodes": [[0, 1], [1, 0]]},
        {"nodes": [[0, None], [1, -1]]},
        {"nodes": [[2, None], [1, 0]]},
        {"nodes": [[-1, None], [1, 0]]},
        {"nodes": [["0", None]]},
        {"nodes": [[0]]},
        {"nodes": [[0, None, 1]]},
        {"nodes": {}},
        {"entries": [{"keys": [K1], "node": 2}]},
        {"entries": [{"keys": [K1], "node": -1}]},
        {"entries": [{"keys": [K1], "node": 0, "config": 1}]},
        {"entries": [{"keys": [K1], "node": 0, "config": -1}]},
        {"entries": [{"keys": ["sha256:x"], "node": 0}]},
        {"entries": [{"keys": [7], "node": 0}]},
        {"entries": [{"keys": K1, "node": 0}]},
        {"entries": [{"node": 0}]},
        {"entries": [None]},
        {"configs": ["%%%"]},
        {"configs": None},
        {"version": "1"},
        {"version": None},
    ],
    ids=str,
)
def test_a_cache_that_contradicts_itself_is_refused(changes):
    """Chains that bite their tail, indices out of range, and what is of another type: by the cache's name."""
    with pytest.raises(MalformedCacheError) as caught:
        decoded(document_of(**changes))
    assert caught.value.reference == "c"


@pytest.mark.parametrize("config", [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"version": 1}'], ids=len)
def test_what_is_no_document_is_refused(config):
    """Whatever bytes there are."""
    with pytest.raises(MalformedCacheError):
        decoded(config)


def test_another_version_is_no_cache():
    """By its number, whatever else is in it: a miss, and not taken for a damaged one."""
    with pytest.raises(NotACacheError, match="version 2"):
        decoded(document_of(version=2, nodes="another shape"))


def test_another_config_is_no_cache():
    """An image, say, or an artifact."""
    with pytest.raises(NotACacheError, match="application/x"):
        decoded(document_of(), media_type="application/x")


def test_a_layer_without_a_diff_id_is_refused():
    """Its ref could not be named."""
    stored = json.loads(encode(RemoteCache.of(ENTRIES), "c").manifest)
    del stored["layers"][1]["annotations"]
    with pytest.raises(MalformedCacheError, match=B.digest):
        decode(parse_manifest(json.dumps(stored).encode(), MANIFEST_OCI, "c"), document_of(), "c")


def test_a_cache_that_no_registry_would_take_is_not_made():
    """Its manifest would be refused after all its layers were sent."""
    layers = [layer_of(str(n).encode()) for n in range(16_000)]
    with pytest.raises(CacheTooLargeError) as caught:
        encode(RemoteCache.of([CacheEntry(keys=(K1,), layers=tuple(layers))]), "r.example/c:1")
    assert caught.value.limit_bytes == 4 * 1024**2


def test_a_cache_travels_in_payloads():
    """As large as the graph; a forged one is refused there too."""
    cache = RemoteCache.of(ENTRIES)
    assert wire.decode("cache", RemoteCache, wire.encode("cache", cache)) == cache
    for forged in (
        {"nodes": [{"layer": 0, "parent": None}]},
        {"entries": [{"keys": [], "node": 0}]},
        {"layers": [{"media_type": "x", "digest": K1, "size_bytes": 1}]},
    ):
        with pytest.raises(MalformedPayloadError):
            wire.decode("cache", RemoteCache, wire.encode("cache", forged))


def test_a_cache_refers_to_nothing_that_it_lacks():
    """Also one that is made in process."""
    with pytest.raises(MalformedCacheError):
        RemoteCache(layers=(A,), nodes=(CacheNode(layer=0, parent=None),), entries=(CachedNode(keys=(K1,), node=1),))


# -- what is exported ---------------------------------------------------------------------------------------------

BELOW, TOP, ASIDE = RefId("below"), RefId("top"), RefId("aside")
VERTICES = (
    ExportCandidate(keys=(K1,), ref=BELOW),
    ExportCandidate(keys=(K2,), ref=TOP, is_target=True),
    ExportCandidate(keys=(K3,), ref=ASIDE),
    ExportCandidate(keys=(K3,), ref=None),
)


def test_min_exports_targets_and_what_they_consist_of():
    """Results whose layers go along anyway cost nothing but their keys."""
    assert select(VERTICES, CacheMode.MIN, {BELOW, TOP}) == list(VERTICES[:2])


def test_max_exports_whatever_has_a_result():
    """What was only copied from as well; but nothing that could not be found."""
    assert select([*VERTICES, ExportCandidate(keys=(), ref=TOP)], CacheMode.MAX, {BELOW, TOP}) == list(VERTICES)


def test_an_empty_target_is_exported():
    """It has no layers that it could be known by."""
    empty = ExportCandidate(keys=(K1,), ref=None, is_target=True)
    assert select([empty], CacheMode.MIN, ()) == [empty]


# -- a cache within an image --------------------------------------------------------------------------------------


def test_an_inline_cache_comes_back():
    """The image's lowest layers, by how many they are; of the image's config nothing else changes."""
    data = embed(CONFIG, (A, B), ENTRIES)
    document = json.loads(data)
    assert document.pop(INLINE_KEY)
    assert document == IMAGE
    assert entries_of(extract(data, (A, B), "image")) == ENTRIES


def test_what_is_not_the_images_lowest_layers_stays_out():
    """Another chain's result can't be had from the image."""
    entries = (CacheEntry(keys=(K1,), layers=(B,)), CacheEntry(keys=(K1,), layers=(A, B, C)), ENTRIES[1])
    assert entries_of(extract(embed(CONFIG, (A, B), entries), (A, B), "image")) == (ENTRIES[1],)


def test_an_inline_cache_takes_the_place_of_the_base_images():
    """Else each build would carry the caches of all that it is built upon, one in the other."""
    base = embed(CONFIG, (A,), ENTRIES[:1])
    derived = embed(base, (A, B), [CacheEntry(keys=(K1,), layers=(A,), config=base), ENTRIES[1]])
    (below, _) = entries_of(extract(derived, (A, B), "image"))
    assert json.loads(below.config) == IMAGE
    assert INLINE_KEY not in json.loads(embed(base, (A,), ()))


def test_an_image_without_a_cache_is_none():
    """A miss."""
    with pytest.raises(NotACacheError):
        extract(CONFIG, (A,), "image")


@pytest.mark.parametrize(
    "told",
    [
        7,
        "%%%",
        base64.b64encode(b"{}").decode(),
        base64.b64encode(json.dumps({"version": 1, "entries": [{"keys": [K1], "layers": 3}], "configs": []}).encode()),
        base64.b64encode(json.dumps({"version": 1, "entries": [{"keys": [K1], "layers": -1}], "configs": []}).encode()),
        base64.b64encode(json.dumps({"version": 1, "entries": [{"keys": ["x"], "layers": 1}], "configs": []}).encode()),
    ],
)
def test_a_forged_inline_cache_is_refused(told):
    """Whatever an image's config has under that key."""
    told = told.decode() if isinstance(told, bytes) else told
    with pytest.raises(MalformedCacheError):
        extract(json.dumps({**IMAGE, INLINE_KEY: told}).encode(), (A, B), "image")


def manifest_of(config, layers=(A, B)):
    return parse_manifest(
        json.dumps(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_OCI,
                "config": {"mediaType": CONFIG_OCI, "digest": digest_of(config), "size": len(config)},
                "layers": [
                    {"mediaType": layer.media_type, "digest": layer.digest, "size": layer.size_bytes}
                    for layer in layers
                ],
            }
        ).encode(),
        MANIFEST_OCI,
        "image",
    )


def test_what_a_name_stands_for_is_read_as_what_it_is():
    """A cache of its own, an image with one, an image without, an image that is none."""
    stored = encode(RemoteCache.of(ENTRIES), "c")
    own = read_cache(parse_manifest(stored.manifest, MANIFEST_OCI, "c"), stored.config, "c")
    assert entries_of(own) == ENTRIES

    plain = json.dumps({**IMAGE, "rootfs": {"type": "layers", "diff_ids": [A.diff_id, B.diff_id]}}).encode()
    image = embed(plain, (A, B), ENTRIES)
    assert entries_of(read_cache(manifest_of(image), image, "image")) == ENTRIES
    with pytest.raises(MalformedManifestError):
        read_cache(manifest_of(image, layers=(A,)), image, "image")
    with pytest.raises(NotACacheError):
        read_cache(manifest_of(plain), plain, "image")
    with pytest.raises(MalformedManifestError):
        read_cache(manifest_of(b"text"), b"text", "image")
