"""Lua scripts by name: ``storage/lua/NAME.lua``, one atomic step a file, its contract at its head.

Redis's Lua has no modules. A line ``-- include: NAME`` stands for ``storage/lua/lib/NAME.lua``, once a
script however often it is named; libraries hold local functions only.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable

_INCLUDE = re.compile(r"^-- include: (\w+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Script:
    """A script as Redis knows it."""

    name: str
    source: str = field(repr=False)
    #: SHA-1 of the source: Redis's own name for it, not a matter of security.
    sha: str

    @classmethod
    def of(cls, name: str, source: str) -> Script:
        """Return the script with that source."""
        return cls(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@cache
def script(name: str) -> Script:
    """Return the script of that name, with its libraries."""
    return Script.of(name, _expand(_read(f"{name}.lua"), included=set()))


@cache
def read_scripts() -> None:
    """Read every script: a process that is there for long keeps those of its release.

    One that came to a script after an upgrade would call the new one, which is next to it on disk by then, with what
    the old one takes.
    """
    for name in script_names():
        script(name)


def script_names() -> list[str]:
    """Return the names of all scripts, sorted."""
    return sorted(entry.name.removesuffix(".lua") for entry in _lua().iterdir() if entry.name.endswith(".lua"))


def _expand(text: str, included: set[str]) -> str:
    def library(match: re.Match[str]) -> str:
        name = match[1]
        if name in included:
            return ""
        included.add(name)
        return _expand(_read(f"lib/{name}.lua"), included)

    return _INCLUDE.sub(library, text)


@cache
def _lua() -> Traversable:
    return files("storage") / "lua"


@cache
def _read(path: str) -> str:
    return (_lua() / path).read_text(encoding="utf-8")
