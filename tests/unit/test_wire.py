"""Payloads: what goes in comes out, and what is damaged is told by type."""

from __future__ import annotations

import inspect
import pickle

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cluster.errors
from cluster import wire
from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.errors import (
    ClusterError,
    MalformedPayloadError,
    NeedsRemoteProvidersError,
    RefNotFoundError,
    RemoteError,
    UnavailableError,
    UnknownVersionError,
)
from cluster.flight.values import Failed, UploadState
from cluster.lease import Lease, LeaseId
from cluster.progress import LayerPhase, ProgressItem
from cluster.provider import ProviderHandle
from cluster.ref import RefRecord, RefState
from storage.codec import Codec

DESCRIPTOR = Descriptor(
    media_type="application/vnd.oci.image.layer.v1.tar+gzip",
    digest=digest_of(b"a"),
    size_bytes=2**40,
    diff_id=digest_of(b"b"),
    annotations={"k": "ü"},
    urls=("https://example.org/x",),
)
RECORD = RefRecord.over(DESCRIPTOR, RefRecord.over(DESCRIPTOR, None), "docker.io/library/debian:12")
VALUES = [
    DESCRIPTOR,
    RECORD,
    RefState(record=RECORD, present=None, providers=(ProviderHandle(registry="r", repository="x"),)),
    Lease(id=LeaseId("l"), expires_wall_s=None, created_wall_s=1.5, labels={"a": "b"}, resources=("blob:x",)),
    UploadState(key="k", upload_id="u", part_bytes=5, parts={1: "a", 10_000: "b"}),
    Failed(fence_number=7, error=b"\x00\xff bytes"),
    ProgressItem(item="fetch:x", phase=LayerPhase.FETCHING, current_bytes=1, total_bytes=2),
]


# -- values -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back(value):
    """Frozen dataclasses with enums, tuples, bytes, nested values and maps by number come back equal."""
    assert wire.decode("x", type(value), wire.encode("x", value)) == value


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_the_bulk_codec_agrees(value):
    """A codec writes the same payload and reads the same value."""
    codec = Codec("x", type(value))

    assert codec.encode(value) == wire.encode("x", value)
    assert codec.decode(wire.encode("x", value)) == value


@pytest.mark.parametrize("read", ["wire", "codec"])
@given(data=st.data(), value=st.sampled_from(VALUES))
def test_a_truncated_payload_is_malformed(read, data, value):
    """Any proper start of a payload is MalformedPayloadError, nothing else."""
    payload = wire.encode("x", value)
    cut = payload[: data.draw(st.integers(0, len(payload) - 1))]

    with pytest.raises(MalformedPayloadError):
        _reader(read, type(value))(cut)


@pytest.mark.parametrize("read", ["wire", "codec"])
@given(garbage=st.binary(min_size=1), value=st.sampled_from(VALUES))
def test_what_follows_a_payload_makes_it_malformed(read, garbage, value):
    """Bytes after the end of a payload are not ignored."""
    with pytest.raises(MalformedPayloadError):
        _reader(read, type(value))(wire.encode("x", value) + garbage)


@pytest.mark.parametrize("read", ["wire", "codec"])
@given(data=st.data(), value=st.sampled_from(VALUES))
def test_a_damaged_payload_is_a_wire_error_or_a_value(read, data, value):
    """Whatever a flipped byte makes of a payload, no foreign exception gets out."""
    payload = bytearray(wire.encode("x", value))
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))

    try:
        decoded = _reader(read, type(value))(bytes(payload))
    except (MalformedPayloadError, UnknownVersionError):
        return
    assert isinstance(decoded, type(value))


@given(st.binary())
def test_garbage_is_malformed(garbage):
    """Bytes that are no payload are told as such."""
    with pytest.raises((MalformedPayloadError, UnknownVersionError)):
        wire.decode("x", Descriptor, garbage)


def _reader(read, type_):
    return Codec("x", type_).decode if read == "codec" else lambda data: wire.decode("x", type_, data)


def test_another_version_is_named():
    """A payload of a later release is told by kind and version, whatever its body has become."""
    for later in ([2, "x", {}], [2, "x"], [2, "x", {}, "more"]):
        with pytest.raises(UnknownVersionError) as caught:
            wire.decode("x", Descriptor, msgpack.packb(later))
        assert (caught.value.kind, caught.value.version) == ("x", 2)


def test_another_kind_is_malformed():
    """A payload of another kind is refused, though its body might fit."""
    with pytest.raises(MalformedPayloadError, match="kind 'y'"):
        wire.decode("x", Descriptor, wire.encode("y", DESCRIPTOR))


@pytest.mark.parametrize("payload", [1, "x", [], [1], [1, "x"], ["1", "x", {}], [True, "x", {}], {"a": 1}, None])
def test_no_envelope_is_malformed(payload):
    """Msgpack that is not [version, kind, body] is refused."""
    with pytest.raises(MalformedPayloadError):
        wire.decode("x", Descriptor, msgpack.packb(payload))


def test_a_body_of_the_wrong_shape_is_malformed():
    """Missing fields, wrong types and values that refuse themselves are told as malformed, by both readers."""
    good = {"media_type": "m", "digest": digest_of(b"a"), "size_bytes": 1}
    for wrong in (good | {"size_bytes": "1"}, good | {"digest": "sha256:no"}, {"media_type": "m"}, [], 7):
        payload = msgpack.packb([1, "x", wrong])
        for read in ("wire", "codec"):
            with pytest.raises(MalformedPayloadError):
                _reader(read, Descriptor)(payload)


def test_a_field_of_a_later_release_is_ignored():
    """Within a version fields may be added: an older reader ignores what it doesn't know."""
    body = {"media_type": "m", "digest": digest_of(b"a"), "size_bytes": 1, "new": {"x": 1}}
    payload = msgpack.packb([1, "x", body])

    assert wire.decode("x", Descriptor, payload).size_bytes == 1
    assert Codec("x", Descriptor).decode(payload).size_bytes == 1


def test_one_value_has_one_encoding():
    """Payloads can be kept in sets: equal values are equal bytes, and start with the header of their kind."""
    one, two = (ProviderHandle(registry="r", repository="x") for _ in range(2))

    assert wire.encode("p", one) == wire.encode("p", two)
    assert wire.encode("p", one).startswith(wire.header("p"))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_payload_is_the_bytes_that_msgpack_writes(body):
    """Whatever wrote what rests in a store, an equal value has an equal payload, and so the same digest."""
    assert wire.encode("x", body) == msgpack.packb([1, "x", body])


@pytest.mark.parametrize("size", [0, 15, 16, 31, 32, 255, 256, 65_535, 65_536])
def test_lengths_are_written_as_short_as_they_can_be(size):
    """At each length at which the form of a text, bytes, a list or a map changes."""
    body = ["x" * size, b"x" * size, [None] * size, {str(i): i for i in range(size)}]

    assert wire.encode("x", body) == msgpack.packb([1, "x", body])


def test_an_unknown_enum_member_is_malformed():
    """An enum that a later release has extended is told, not guessed."""
    with pytest.raises(MalformedPayloadError):
        wire.decode("x", ProgressItem, msgpack.packb([1, "x", {"item": "i", "phase": "levitating"}]))


# -- errors -------------------------------------------------------------------------------------------


def error_classes() -> list[type[ClusterError]]:
    """Every class of the tree that is part of the farm, new ones too."""
    found = [ClusterError]
    for cls in found:
        found.extend(sub for sub in cls.__subclasses__() if sub not in found)
    return [cls for cls in found if cls.__module__ == cluster.errors.__name__]


_ARGUMENTS = {
    "str": st.text(),
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False),
    "bool": st.booleans(),
    "bytes": st.binary(),
    "tuple[str, ...]": st.lists(st.text()).map(tuple),
    "str | None": st.none() | st.text(),
    "int | None": st.none() | st.integers(0, 2**31),
    "float | None": st.none() | st.floats(allow_nan=False),
}


@st.composite
def errors(draw, cls):
    """An error of that class, with arguments that fit its signature."""
    if cls.__init__ is Exception.__init__:
        return cls(*draw(st.lists(st.text(), max_size=2)))
    arguments = []
    for parameter in list(inspect.signature(cls.__init__).parameters.values())[1:]:
        if parameter.kind is not inspect.Parameter.POSITIONAL_OR_KEYWORD:
            break
        arguments.append(draw(_ARGUMENTS[str(parameter.annotation)]))
    return cls(*arguments)


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("way", ["wire", "pickle"])
@given(data=st.data())
def test_every_error_crosses(way, cls, data):
    """Every class of the tree comes back with class, arguments, fields, message and hint."""
    error = data.draw(errors(cls))

    def pickled(error):
        return pickle.loads(pickle.dumps(error))  # noqa: S301 - our own

    back = wire.decode_error(wire.encode_error(error)) if way == "wire" else pickled(error)

    assert type(back) is cls
    assert back.args == error.args
    assert vars(back) == vars(error)
    assert (str(back), back.hint, back.retryable) == (str(error), error.hint, error.retryable)


def test_an_error_of_a_later_release_keeps_its_message():
    """A class that this release doesn't know arrives as RemoteError with its name and what it said."""
    payload = msgpack.packb([1, "error", {"type": "NewError", "args": [1], "message": "something new"}])

    error = wire.decode_error(payload)

    assert isinstance(error, RemoteError)
    assert (error.type_name, error.message) == ("NewError", "something new")
    assert str(error) == "NewError: something new"


def test_an_error_whose_signature_has_changed_keeps_its_message():
    """A known class with arguments that don't fit any more arrives as RemoteError."""
    payload = msgpack.packb([1, "error", {"type": "RefNotFoundError", "args": [1, 2, 3], "message": "changed"}])

    assert str(wire.decode_error(payload)) == "RefNotFoundError: changed"


def test_an_error_with_arguments_that_cant_cross_keeps_its_message():
    """Arguments that are not plain data stay behind; the message crosses."""
    error = wire.decode_error(wire.encode_error(ClusterError(object)))

    assert isinstance(error, RemoteError)
    assert error.type_name == "ClusterError"


def test_an_error_caught_by_class_after_the_wire():
    """What was raised on one node is caught as that on another."""
    with pytest.raises(NeedsRemoteProvidersError) as caught:
        raise wire.decode_error(wire.encode_error(NeedsRemoteProvidersError(("a", "b"))))
    assert caught.value.digests == ("a", "b")


@given(data=st.data(), error=st.sampled_from([RefNotFoundError("x"), UnavailableError("a", "b")]))
def test_a_truncated_error_is_malformed(data, error):
    """A truncated error is an error of its own, MalformedPayloadError."""
    payload = wire.encode_error(error)

    with pytest.raises(MalformedPayloadError):
        wire.decode_error(payload[: data.draw(st.integers(0, len(payload) - 1))])
