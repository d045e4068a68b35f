"""The fields of ``RUN --mount``, as mounts of a build graph."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lazyfarm import graph
from lazyfarm.dockerfile.refused import RefusedError

_ALIASES = {"src": "source", "dst": "target", "destination": "target", "ro": "readonly", "rw": "readwrite"}
_FIELDS = {
    "bind": frozenset({"from", "source", "target", "readonly", "readwrite"}),
    "cache": frozenset({"id", "from", "source", "target", "readonly", "readwrite", "sharing", "mode", "uid", "gid"}),
    "tmpfs": frozenset({"target", "size"}),
    "secret": frozenset({"id", "source", "target", "env", "required", "mode", "uid", "gid"}),
}
_UNITS = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3, "t": 1024**4}
_SIZE = re.compile(r"(?P<number>\d+)(?P<unit>[kmgt]?)(?:i?b)?\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class MountPlace:
    """What a mount's fields are taken in the light of."""

    #: What relative targets are relative to.
    directory: str
    expand: Callable[[str], str]
    #: The filesystem that a ``from`` names; "" for the build context.
    source: Callable[[str], graph.State]


def read_mount(fields: Mapping[str, str], place: MountPlace) -> graph.Mount:
    """Return the mount that the fields of one ``--mount`` ask for.

    Raises:
        RefusedError: a field is unknown, missing or malformed, or the mount is not supported.
    """
    return _Fields(fields, place).mount()


class _Fields:
    def __init__(self, fields: Mapping[str, str], place: MountPlace) -> None:
        self._place = place
        self._kind = fields.get("type", "bind")
        self._fields: dict[str, str] = {}
        if self._kind == "ssh":
            raise RefusedError("--mount=type=ssh is not supported: use a secret")
        if self._kind not in _FIELDS:
            raise RefusedError(f"--mount has no type {self._kind!r}: bind, cache, secret or tmpfs")
        for written, value in fields.items():
            name = _ALIASES.get(written, written)
            if name == "type":
                continue
            if name not in _FIELDS[self._kind]:
                raise RefusedError(f"a mount of type {self._kind} has no field {written!r}")
            if name in self._fields:
                raise RefusedError(f"a mount has its {name} twice")
            # What --from names must be known before anything is expanded.
            self._fields[name] = value if name == "from" else place.expand(value)

    def mount(self) -> graph.Mount:
        match self._kind:
            case "bind":
                return graph.bind(
                    self._place.source(self._fields.get("from", "")),
                    # BuildKit's: without a target it is the working directory.
                    self._absolute(self._fields.get("target", "")),
                    from_path=self._fields.get("source") or "/",
                    read_only=not self._boolean("readwrite", "readonly"),
                )
            case "cache":
                if self._fields.get("from") or self._fields.get("source", "/") not in ("", "/"):
                    raise RefusedError("a cache mount that begins with the files of another stage is not supported")
                target = self._target()
                return graph.cache(
                    target,
                    id=self._fields.get("id") or target,
                    sharing=self._fields.get("sharing", "shared").lower(),
                    read_only=self._boolean("readonly", "readwrite"),
                    mode=self._number("mode", 0o755, base=8),
                    uid=self._number("uid", 0),
                    gid=self._number("gid", 0),
                )
            case "secret":
                return self._secret()
            case _:
                return graph.tmpfs(self._target(), size_bytes=self._size())

    def _secret(self) -> graph.Mount:
        target = self._fields.get("target", "")
        name = self._fields.get("id") or self._fields.get("source") or posixpath.basename(target)
        if not name:
            raise RefusedError("a secret mount needs an id")
        return graph.secret(
            name,
            target=self._absolute(target) if target else None,
            env=self._fields.get("env", ""),
            required=self._boolean("required"),
            mode=self._number("mode", 0o400, base=8),
            uid=self._number("uid", 0),
            gid=self._number("gid", 0),
        )

    def _target(self) -> str:
        target = self._fields.get("target")
        if not target:
            raise RefusedError(f"a mount of type {self._kind} needs a target")
        return self._absolute(target)

    def _absolute(self, path: str) -> str:
        return posixpath.normpath(posixpath.join(self._place.directory, path))

    def _boolean(self, name: str, opposite: str = "") -> bool:
        """Return whether *name* is set, or its *opposite* is set to false."""
        for field, is_same in ((name, True), (opposite, False)):
            if (text := self._fields.get(field)) is not None:
                if text.lower() not in ("true", "false", "1", "0"):
                    raise RefusedError(f"{field} of a mount is true or false, not {text!r}")
                return (text.lower() in ("true", "1")) == is_same
        return False

    def _number(self, name: str, default: int, *, base: int = 10) -> int:
        text = self._fields.get(name)
        if text is None:
            return default
        try:
            return int(text, base)
        except ValueError:
            raise RefusedError(f"{name} of a mount is a number, not {text!r}") from None

    def _size(self) -> int:
        text = self._fields.get("size", "0")
        found = _SIZE.match(text)
        if found is None:
            raise RefusedError(f"size of a mount is a number of bytes, such as 64m, not {text!r}")
        return int(found["number"]) * _UNITS[found["unit"].lower()]
