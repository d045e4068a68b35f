"""What ``configs/default.toml`` says of each key: its comment is the reference, and this reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InvalidArgumentError

_SECTION = re.compile(r"\[(?P<name>[^\]]+)\]\Z")
_KEY = re.compile(r"(?P<key>[a-z][a-z0-9_]*) = (?P<value>.*?)(?:\s+# (?P<aside>[^\"']*))?\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyReference:
    """One key as the default configuration has it."""

    #: ``section.key``; a registry's is ``registries.default.key``.
    key: str
    #: Its default, as TOML.
    default: str
    #: What it means, with unit, range and reason, as one paragraph.
    text: str

    @property
    def variable(self) -> str:
        """Return the environment variable that sets it."""
        return "LAZYFARM__" + self.key.replace(".", "__").upper()


def default_file() -> Path:
    """Return the file with every key: beside the package where it was installed, else in the checkout."""
    package = Path(__file__).parent
    installed = package / "configs" / "default.toml"
    return installed if installed.exists() else package.parent / "configs" / "default.toml"


def read_reference(text: str) -> list[KeyReference]:
    """Return every key of a commented configuration file, in its order."""
    found: list[KeyReference] = []
    section, comment = "", []
    for line in text.splitlines():
        if line.startswith("#"):
            comment.append(line.removeprefix("#").strip())
        elif match := _SECTION.match(line):
            section, comment = match["name"], []
        elif match := _KEY.match(line):
            default = match["value"] + (f" ({match['aside']})" if match["aside"] else "")
            found.append(KeyReference(key=f"{section}.{match['key']}", default=default, text=" ".join(comment)))
            comment = []
        else:
            comment = []
    return found


def every_key() -> list[KeyReference]:
    """Return every key there is, in the order of the default file."""
    return read_reference(default_file().read_text(encoding="utf-8"))


def explain(name: str) -> list[KeyReference]:
    """Return the keys that *name* means: one, by ``section.key`` or by the key alone, or all of a section.

    Raises:
        InvalidArgumentError: it means none; names such as are alike.
    """
    every = every_key()
    wanted = re.sub(r'^registries\."?[^"]+?"?\.(?=[a-z_]+$)', "registries.default.", name)
    for is_meant in (
        lambda key: key == wanted,
        lambda key: key.rpartition(".")[0] in (wanted, f"{wanted}.default"),
        lambda key: key.rpartition(".")[2] == wanted,
    ):
        if found := [reference for reference in every if is_meant(reference.key)]:
            return found
    alike = [reference.key for reference in every if wanted.rpartition(".")[2] in reference.key]
    advice = f"there are {', '.join(alike)}" if wanted and alike else "`lazyfarm config explain` lists every key"
    raise InvalidArgumentError("KEY", repr(name), f"no key is called so; {advice}")
