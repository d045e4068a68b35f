"""Payloads: versioned msgpack of plain data, for actor boundaries and for what rests in Redis.

A payload is the msgpack array ``[version, kind, body]``. msgpack turns bytes into plain data, and
msgspec plain data into checked values: no class of ours is pickled, so two releases of the farm can
talk during a rolling upgrade. Within a version, fields may be added (with a default); unknown ones are
ignored. A change that an older reader would misunderstand takes a new version.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

import msgpack
import msgspec

from cluster.errors import ClusterError, MalformedPayloadError, RemoteError, UnknownVersionError

#: The version written, and the only one read.
VERSION = 1

T = TypeVar("T")

_ENVELOPE_ITEMS = 3
_ERROR_KIND = "error"

_encoder = msgspec.msgpack.Encoder()


def encode(kind: str, value: object) -> bytes:
    """Return the payload of *value*, a (dataclass) value made of plain data, bytes, enums and tuples.

    One value has one encoding, so payloads may be compared and kept in sets.
    """
    return _encoder.encode((VERSION, kind, value))


def decode(kind: str, type_: type[T], data: bytes) -> T:
    """Return the value in a payload of that kind.

    Raises:
        UnknownVersionError: another release wrote it, in a form that is unknown here.
        MalformedPayloadError: it is truncated, has something after its end, is no payload at all, is of
            another kind, or doesn't have the shape of *type_*.
    """
    reader: Reader[T] | None = _readers.get((kind, type_))
    if reader is None:
        reader = _readers[kind, type_] = Reader(kind, type_)
    return reader.decode(data)


def header(kind: str) -> bytes:
    """Return what every payload of that kind starts with; its body follows."""
    packer = msgpack.Packer()
    start: bytes = packer.pack_array_header(_ENVELOPE_ITEMS) + packer.pack(VERSION) + packer.pack(kind)
    return start


class Reader(Generic[T]):
    """Decodes the values of one type from payloads of one kind.

    After the constant header of its kind, a body is read straight into a typed value, in a third of the time that it
    takes by way of plain data. Whatever is not as it should be goes that way, so as to be judged and told properly.
    """

    def __init__(self, kind: str, type_: type[T]) -> None:
        self._kind = kind
        self._type = type_
        self._header = header(kind)
        self._skip = len(self._header)
        self._decoder = msgspec.msgpack.Decoder(type_)

    def decode(self, data: bytes) -> T:
        """Return the value in a payload; raises as :func:`decode`."""
        if data.startswith(self._header):
            try:
                return self._decoder.decode(memoryview(data)[self._skip :])
            except (msgspec.DecodeError, ValueError, RecursionError, ClusterError):
                pass  # told properly below; ValueError: msgspec lets bad UTF-8 through as such
        body = _body(self._kind, data)
        try:
            return msgspec.convert(body, self._type)
        except (msgspec.ValidationError, ClusterError, RecursionError) as exc:
            # ClusterError: values check themselves when they are made (a malformed digest, say).
            raise MalformedPayloadError(self._kind, str(exc)) from exc


#: By kind and type; one for each that the farm has.
_readers: dict[tuple[str, Any], Reader[Any]] = {}


def encode_error(error: ClusterError) -> bytes:
    """Return the payload of an error: its class by name, its arguments, and what it says."""
    try:
        args = msgspec.to_builtins(error.args, builtin_types=(bytes,))
        return encode(_ERROR_KIND, {"type": type(error).__name__, "args": args, "message": str(error)})
    except (TypeError, ValueError, OverflowError):
        # Arguments that are not plain data: what it says still gets across.
        return encode(_ERROR_KIND, {"type": type(error).__name__, "args": None, "message": str(error)})


def decode_error(data: bytes) -> ClusterError:
    """Return the error in a payload; a :class:`RemoteError` where this release doesn't know its class.

    Raises:
        UnknownVersionError: as :func:`decode`.
        MalformedPayloadError: as :func:`decode`.
    """
    told = decode(_ERROR_KIND, _Error, data)
    if told.args is not None:
        for cls in _error_classes(ClusterError):
            if cls.__name__ == told.type:
                try:
                    error = cls(*_as_tuples(told.args))
                    is_telling = isinstance(str(error), str) and isinstance(error.hint, str)
                except Exception:  # noqa: BLE001 -- another release's signature, or none's: what it says still gets across
                    break
                if not is_telling:
                    break
                return error
    return RemoteError(told.type, told.message)


class _Error(msgspec.Struct):
    """The body of an error's payload."""

    type: str
    message: str
    args: list[Any] | None = None


def _body(kind: str, data: bytes) -> object:
    try:
        envelope = msgpack.unpackb(data, strict_map_key=False)
    except (ValueError, TypeError, RecursionError) as exc:
        # Truncated, trailing bytes and bad UTF-8 are all ValueErrors; TypeError: an unhashable map key.
        raise MalformedPayloadError(kind, f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__) from exc
    match envelope:
        case [int(version), str(actual), body] if not isinstance(version, bool):
            if version != VERSION:
                raise UnknownVersionError(actual, version)
            if actual != kind:
                raise MalformedPayloadError(kind, f"it is a payload of kind {actual!r}")
            return body
        case [int(version), str(actual), *_] if not isinstance(version, bool) and version != VERSION:
            raise UnknownVersionError(actual, version)
        case _:
            raise MalformedPayloadError(kind, "it is not [version, kind, body]")


def _error_classes(cls: type[ClusterError]) -> Iterator[type[ClusterError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _error_classes(sub)


def _as_tuples(value: Any) -> Any:
    """Turn lists into tuples, all the way down: the arguments of our errors are hashable."""
    if isinstance(value, list):
        return tuple(_as_tuples(item) for item in value)
    return value
