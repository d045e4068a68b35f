"""What strangers send, garbled at will: always a value or a typed error, never anything else, and never outside.

Layers, manifests, indexes, configs, challenges and tokens come from registries; payloads from whoever can write
to Redis or call an actor.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import msgpack
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import cluster.errors
from cluster import wire
from cluster.descriptor import INDEX_OCI, MANIFEST_OCI, Compression
from cluster.digest import digest_of
from cluster.errors import ClusterError, LayerError, MalformedManifestError, RegistryProtocolError
from cluster.image import Index, Manifest, parse_config, parse_manifest
from cluster.ref import RefRecord
from storage.registry.auth import _parse_token
from storage.registry.challenge import parse_challenges
from storage.snapshots import CopyingSnapshotter, LayerLimits
from tests.doubles.layers import apply, character, directory, facts, file, hard_link, layer_of, layer_tar, symlink

BLOCK = 512

# -- layers --------------------------------------------------------------------------------------------

SEED = layer_tar(
    directory("d"),
    file("d/f", b"x" * 700),
    file("d/" + "long/" * 40 + "name", b"y"),
    symlink("d/out", "../../../victim"),
    hard_link("d/same", "d/f"),
    file("d/attributes", b"z", xattrs={"user.k": b"v"}, pax={"comment": "c" * 600}),
    character("d/null", 1, 3),
)
HEADERS = [at for at in range(0, len(SEED), BLOCK) if SEED[at + 257 : at + 262] == b"ustar"]
#: Where a header keeps its name, mode, owner, size, time, type, link, device and prefix.
FIELDS = [(0, 100), (100, 8), (108, 8), (116, 8), (124, 12), (136, 12), (156, 1), (157, 100), (329, 16), (345, 155)]
VALUES = st.one_of(
    st.binary(max_size=12),
    st.sampled_from(
        [
            *(b"../../victim/new", b"/../victim/new", b"d/out/new", b"../victim/secret", b"\x80" + b"\xff" * 11),
            *(b"\xff" * 12, b"77777777777", b"-1", b"0" * 12, b"\0", b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"3"),
        ]
    ),
)


FORGERY = st.tuples(st.sampled_from(HEADERS), st.sampled_from(FIELDS), VALUES)
#: A byte anywhere and what it becomes.
BLEMISH = st.tuples(st.integers(0, len(SEED) - 1), st.integers(0, 255))


def garbled(forgeries, blemishes, end) -> bytes:
    """Return a layer with fields of its headers changed under a right checksum, other bytes broken, and cut off."""
    tar = bytearray(SEED)
    for at, (offset, length), value in forgeries:
        tar[at + offset : at + offset + length] = value[:length].ljust(length, b"\0")
        tar[at + 148 : at + 156] = b" " * 8
        tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + BLOCK])
    for at, value in blemishes:
        tar[at] = value
    return bytes(tar[:end])


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example([(HEADERS[1], (108, 8), b"\x81")], [], None, Compression.NONE)
@example([(HEADERS[1], (116, 8), b"\x80\0\0\0" + b"\xff" * 4)], [], None, Compression.NONE)
@example([(HEADERS[1], (124, 12), b"\x80" + b"\xff" * 11)], [], None, Compression.NONE)
@example([(HEADERS[-1], (329, 16), b"\xff" * 16)], [], None, Compression.NONE)
@example([(HEADERS[-1], (329, 16), b"\x80\0\0\0\xff" + b"\0" * 11)], [], None, Compression.NONE)
@example([(HEADERS[0], (0, 100), b"d/out/new"), (HEADERS[0], (156, 1), b"0")], [], None, Compression.NONE)
@given(
    st.lists(FORGERY, min_size=1, max_size=3),
    st.lists(BLEMISH, max_size=1),
    st.one_of(st.none(), st.none(), st.integers(1, len(SEED))),
    st.sampled_from([Compression.NONE, Compression.GZIP]),
)
def test_a_garbled_layer_is_unpacked_or_refused_and_nothing_outside_is_touched(forgeries, blemishes, end, compression):
    """Negative and huge sizes, links and names that lead out, devices, broken headers: LayerError, or a snapshot."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as scratch:
        root = Path(scratch)
        (root / "victim").mkdir()
        (root / "victim" / "secret").write_text("mine")
        before = facts(root / "victim")
        snapshotter = CopyingSnapshotter(root / "node", LayerLimits(tar_bytes=1024**2, entries=500))
        try:
            apply(snapshotter, None, layer_of(garbled(forgeries, blemishes, end), compression))
        except LayerError:
            assert not list(snapshotter.snapshots())
        assert facts(root / "victim") == before
        assert sorted(path.name for path in root.iterdir()) == ["node", "victim"]


# -- documents -----------------------------------------------------------------------------------------

DIGEST = digest_of(b"x")
WORDS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from(
        [-1, 2**63, 2**200, 10**400, float("inf"), float("nan"), 1e308, 0.5, "", "\ud800", "../..", DIGEST]
    ),
    st.text(max_size=5),
)
JSON = st.recursive(
    WORDS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["digest", "size", "mediaType", "urls", "annotations", "x"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
DESCRIPTOR = {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": DIGEST, "size": 7}
GOOD = [
    {"schemaVersion": 2, "mediaType": MANIFEST_OCI, "config": DESCRIPTOR, "layers": [DESCRIPTOR, DESCRIPTOR]},
    {
        "schemaVersion": 2,
        "mediaType": INDEX_OCI,
        "manifests": [{**DESCRIPTOR, "platform": {"os": "linux", "architecture": "amd64"}}],
    },
    {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [DIGEST]}},
]


def places(value, path=()):
    """Return the path of everything within a document."""
    found = [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@st.composite
def documents(draw) -> bytes:
    """A document with something else, of another type most likely, in one of its places or two."""
    document = json.loads(json.dumps(draw(st.sampled_from(GOOD))))
    for _ in range(draw(st.integers(1, 2))):
        *above, last = draw(st.sampled_from([path for path in places(document) if path]))
        holder = document
        for step in above:
            holder = holder[step]
        holder[last] = draw(JSON)
    return json.dumps(document).encode()


BAD_DOCUMENTS = [
    b"[" * 100_000,
    b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    b'{"schemaVersion": 2, "layers": [' + b"9" * 5000 + b"]}",
    b'{"manifests": [], "layers": []}',
    b'{"rootfs": {"diff_ids": [' + b"[" * 2000 + b"]" * 2000 + b"]}}",
    b"\xff\xfe" + b"\x00" * 64,
    b"",
]


def with_bad_documents(test):
    for document in BAD_DOCUMENTS:
        test = example(document)(test)
    return test


@settings(max_examples=300, deadline=None)
@given(st.one_of(documents(), st.binary(max_size=64)))
@with_bad_documents
def test_a_garbled_document_is_parsed_or_refused_by_type(data):
    """Manifests, indexes and configs of wrong types, sizes, depths and encodings: a ClusterError, or sane values."""
    try:
        found = parse_manifest(data, MANIFEST_OCI, "r/x:t")
    except ClusterError:
        pass
    else:
        inside = found.layers if isinstance(found, Manifest) else [entry.manifest for entry in found.entries]
        assert isinstance(found, Manifest | Index)
        assert all(each.size_bytes >= 0 and each.digest.startswith("sha256:") for each in inside)
    try:
        config = parse_config(data, "r/x:t")
    except ClusterError:
        return
    assert all(diff_id.startswith("sha256:") for diff_id in config.diff_ids)


def test_a_document_of_too_many_bytes_is_refused_unread():
    """Millions of layers are more than 4 MiB: the length alone refuses them."""
    many = json.dumps({"schemaVersion": 2, "layers": [DESCRIPTOR] * 40_000, "config": DESCRIPTOR}).encode()
    with pytest.raises(MalformedManifestError, match="larger than"):
        parse_manifest(many, MANIFEST_OCI, "r/x:t")


@pytest.mark.parametrize(
    "twice",
    [
        b'{"schemaVersion":2,"config":%s,"layers":[],"layers":[%s]}',
        b'{"schemaVersion":2,"config":%s,"config":{"mediaType":"m"},"config":%s,"layers":[]}',
    ],
)
def test_of_a_key_that_comes_twice_the_last_one_counts(twice):
    """As in Go and Python alike: what is pulled is what other clients pull by that digest."""
    descriptor = json.dumps(DESCRIPTOR).encode()
    found = parse_manifest(twice % (descriptor, descriptor), MANIFEST_OCI, "r/x:t")
    assert isinstance(found, Manifest)
    assert found.config.digest == DIGEST


# -- challenges and tokens -----------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='Bearer realm="h,\\ \t=;x/:', max_size=80))
@example('Bearer realm="' + "\\" * 200_000)
@example('Bearer realm="' + "a" * 1_000_000)
@example("Basic " + "," * 1_000_000)
@example('a="b",' * 100_000)
@example("Bearer " + "x=" * 300_000)
@example("Negotiate " + "=" * 300_000)
def test_a_challenge_is_read_in_time_that_grows_with_its_length(header):
    """Megabytes of it, unclosed quotes and all: it never raises, and pytest's timeout would tell a slow one."""
    for challenge in parse_challenges(header):
        assert challenge.scheme


@settings(max_examples=200, deadline=None)
@given(st.one_of(JSON.map(lambda value: json.dumps({"token": value, "expires_in": value}).encode()), st.binary()))
@example(b'{"token":' + b"[" * 100_000)
@example(b'{"token": "a\\r\\nSet-Cookie: x"}')
@example(b'{"token": "t", "expires_in": 1e999}')
@example(b'{"token": "t", "expires_in": NaN}')
def test_a_token_answer_is_a_token_or_refused(body):
    """What can't go into a header is no token, and a time that is none is the default; the answer is not repeated."""
    try:
        token, expires_in_s = _parse_token(SimpleNamespace(status=200, body=body), "https://auth.example/token")
    except RegistryProtocolError as exc:
        refusal = exc
    else:
        assert token.isprintable()
        assert 0 < expires_in_s < float("inf")
        return
    assert refusal.detail in ("its answer can't be read", "its answer has no token")


# -- payloads ------------------------------------------------------------------------------------------

PLAIN = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63), 2**64 - 1),
        st.floats(),
        st.text(max_size=4),
        st.binary(max_size=4),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=8,
)
ERRORS = sorted(
    name for name, one in vars(cluster.errors).items() if isinstance(one, type) and issubclass(one, ClusterError)
)


def nested(depth: int) -> bytes:
    """Return the payload of an error whose arguments are that deep."""
    head = msgpack.packb([1, "error"])[1:]
    body = msgpack.packb({"type": "UnavailableError", "message": "m"})
    args = b"\x91" * depth + b"\xc0"
    return b"\x93" + head + b"\x83" + body[1:] + msgpack.packb("args") + args


@settings(max_examples=300, deadline=None)
@example("OtherDigestError", [None, None], "")
@given(st.sampled_from(ERRORS), st.lists(PLAIN, max_size=4), st.text(max_size=5))
def test_an_error_with_any_arguments_is_an_error_that_can_be_told(name, args, message):
    """Arguments of wrong types and numbers make an error all the same, whose text and hint can be had."""
    error = wire.decode_error(msgpack.packb([1, "error", {"type": name, "args": args, "message": message}]))
    assert isinstance(error, ClusterError)
    assert isinstance(str(error), str)
    assert isinstance(error.hint, str)


@pytest.mark.parametrize("depth", [10, 500, 990, 1023, 1500, 100_000])
def test_an_error_of_deep_arguments_is_read_or_refused(depth):
    """No depth of a payload exhausts the stack."""
    try:
        error = wire.decode_error(nested(depth))
    except cluster.errors.MalformedPayloadError:
        return
    assert isinstance(error, ClusterError)
    assert isinstance(str(error), str)


@pytest.mark.parametrize(
    "bomb",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x91" * 1_000_000,
    ],
    ids=["array", "map", "text", "bytes", "extension", "depth"],
)
def test_a_payload_that_claims_gigabytes_is_malformed(bomb):
    """A length is believed only as far as there are bytes: nothing of that size is allocated."""
    for payload in (bomb, b"\x93\x01\xa3ref" + bomb):
        with pytest.raises(cluster.errors.MalformedPayloadError):
            wire.decode("ref", RefRecord, payload)
