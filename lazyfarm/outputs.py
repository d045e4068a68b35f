"""Where results go: ``--output``, as BuildKit's users write it, as a value."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from enum import Enum

from cluster.errors import InvalidOutputError
from cluster.reference import parse_reference

#: The destination that is the command's standard output.
STDOUT = "-"


class OutputKind(Enum):
    """What is made of a result."""

    #: An OCI image layout: a directory with the image in it, beside others.
    OCI_LAYOUT = "oci"
    #: A tar of an OCI image layout with this one image.
    OCI_ARCHIVE = "oci-archive"
    #: The image's files, in a directory.
    LOCAL = "local"
    #: The image's files, in a tar.
    TAR = "tar"
    #: An image of the farm, under one name or several.
    IMAGE = "image"


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """One output of a build."""

    kind: OutputKind
    #: Path of the file or directory; :data:`STDOUT` for archives; "" for an image of the farm.
    dest: str = ""
    #: Normalised references; none: whatever the image is called.
    names: tuple[str, ...] = ()
    #: Push it to the registries of its names; for images of the farm.
    push: bool = False

    def __str__(self) -> str:
        return f"{self.kind.value}:{self.dest or ','.join(self.names)}"


_DIRECTORIES = (OutputKind.OCI_LAYOUT, OutputKind.LOCAL)
#: Short forms: ``oci:DIR``.
_PREFIXES = {f"{kind.value}:": kind for kind in (OutputKind.OCI_LAYOUT, OutputKind.OCI_ARCHIVE, OutputKind.LOCAL)}
_KEYS = {
    "oci": {"dest", "name", "tar"},
    "local": {"dest"},
    "tar": {"dest"},
    "image": {"name", "push"},
    "registry": {"name", "push"},
}


def parse_output(text: str) -> Output:
    """Parse ``type=oci|tar|local|image|registry,dest=…,name=…,push=true``, or a short form.

    The short forms are ``DIR`` (local) and ``-`` (a tar of the files, to standard output), and, as skopeo spells
    them, ``oci:DIR``, ``oci-archive:FILE`` and ``local:DIR``. A field with commas in it is quoted as CSV is:
    ``type=image,"name=a,b"``. An ``oci`` output is an archive unless it says ``tar=false``; an archive without a
    destination goes to standard output; a directory needs one.

    Raises:
        InvalidOutputError: it says none of that. InvalidReferenceError: a name doesn't parse.
    """
    short = _short(text)
    if short is not None:
        return short
    said = _said(text, _fields(text))
    type_ = said.pop("type", "")
    if not type_:
        raise InvalidOutputError(text, f"it lacks a type: {', '.join(_KEYS)}")
    if type_ not in _KEYS:
        raise InvalidOutputError(text, f"there is no type {type_}: {', '.join(_KEYS)}")
    unknown = sorted(said.keys() - _KEYS[type_])
    if unknown:
        raise InvalidOutputError(
            text, f"type={type_} takes no {', '.join(unknown)}, only {', '.join(sorted(_KEYS[type_]))}"
        )
    names = tuple(parse_reference(name.strip()).name for name in said.get("name", "").split(",") if name.strip())
    match type_:
        case "oci":
            is_archive = _flag(text, said, "tar", default=True)
            kind = OutputKind.OCI_ARCHIVE if is_archive else OutputKind.OCI_LAYOUT
            return _output(text, kind, said.get("dest", ""), names)
        case "local":
            return _output(text, OutputKind.LOCAL, said.get("dest", ""))
        case "tar":
            return _output(text, OutputKind.TAR, said.get("dest", ""))
        case _:
            push = _flag(text, said, "push", default=type_ == "registry")
            return Output(kind=OutputKind.IMAGE, names=names, push=push)


def _short(text: str) -> Output | None:
    for prefix, kind in _PREFIXES.items():
        if text.startswith(prefix):
            return _output(text, kind, text.removeprefix(prefix))
    if text == STDOUT:
        return Output(kind=OutputKind.TAR, dest=STDOUT)
    if text and _fields(text) == [text] and ("=" not in text or "/" in text.partition("=")[0]):
        return _output(text, OutputKind.LOCAL, text)
    return None


def _output(text: str, kind: OutputKind, dest: str, names: tuple[str, ...] = ()) -> Output:
    if kind in _DIRECTORIES and dest in ("", STDOUT):
        raise InvalidOutputError(text, "it needs a directory: dest=DIR")
    return Output(kind=kind, dest=dest or STDOUT, names=names)


def _fields(text: str) -> list[str]:
    try:
        rows = list(csv.reader([text], strict=True))
    except csv.Error as exc:
        raise InvalidOutputError(text, f"it doesn't parse as CSV: {exc}") from exc
    if len(rows) != 1 or not rows[0]:
        raise InvalidOutputError(text, "it is empty")
    return rows[0]


def _said(text: str, fields: list[str]) -> dict[str, str]:
    said: dict[str, str] = {}
    for field in fields:
        key, is_pair, value = field.partition("=")
        key = key.strip().lower()
        if not is_pair:
            raise InvalidOutputError(text, f"{field!r} is not KEY=VALUE")
        if key in said:
            raise InvalidOutputError(text, f"it says {key} twice")
        said[key] = value
    return said


def _flag(text: str, said: dict[str, str], key: str, *, default: bool) -> bool:
    match said.get(key, "").lower():
        case "":
            return default
        case "true" | "1":
            return True
        case "false" | "0":
            return False
        case other:
            raise InvalidOutputError(text, f"{key} is true or false, not {other}")
