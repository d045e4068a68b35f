"""What the options of ``lazyfarm build`` mean: docker's and buildx's forms, checked before anything else is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InvalidArgumentError, InvalidReferenceError
from cluster.reference import ImageReference, parse_reference

#: Kinds of ``--output`` that a farm writes, by what buildx calls them.
_EXPORTS = ("oci", "oci-archive", "local")
_TRUE = frozenset({"1", "t", "true"})
_FALSE = frozenset({"0", "f", "false"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where what is built goes."""

    #: ``oci:DIR``, ``oci-archive:FILE``, ``local:DIR``.
    exports: tuple[str, ...]
    #: What the image is called.
    tags: tuple[ImageReference, ...]
    #: Of these, what is pushed.
    pushes: tuple[ImageReference, ...]


def build_args(texts: Sequence[str], environ: Mapping[str, str]) -> dict[str, str]:
    """Return build arguments from ``NAME=VALUE``; of ``NAME`` alone, the environment's value if it has one.

    Raises:
        InvalidArgumentError: a name is empty.
    """
    args: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name.strip():
            raise InvalidArgumentError("--build-arg", repr(text), "write it as NAME=VALUE, or NAME")
        if equals:
            args[name] = value
        elif name in environ:
            args[name] = environ[name]
    return args


def labels(texts: Sequence[str]) -> dict[str, str]:
    """Return labels from ``NAME=VALUE``, or ``NAME`` for an empty value.

    Raises:
        InvalidArgumentError: a name is empty.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name.strip():
            raise InvalidArgumentError("--label", repr(text), "write it as NAME=VALUE")
        found[name] = value
    return found


def secrets(texts: Sequence[str], environ: Mapping[str, str]) -> dict[str, bytes | Path]:
    """Return secrets by ID from ``id=ID[,src=FILE|,env=VARIABLE]``: files, which are there, or values.

    With an ID alone it is the variable of that name, or else the file. No value is in any error.

    Raises:
        InvalidArgumentError: one can't be meant, or had.
    """
    found: dict[str, bytes | Path] = {}
    for text in texts:
        fields = _fields("--secret", text, {"id", "src", "source", "env", "type"})
        name = fields.get("id", "")
        source, variable, kind = (
            fields.get("src") or fields.get("source", ""),
            fields.get("env", ""),
            fields.get("type"),
        )
        if not name:
            raise InvalidArgumentError("--secret", repr(text), "it has no id")
        if name in found:
            raise InvalidArgumentError("--secret", repr(text), f"the id {name} is given twice")
        if kind not in (None, "file", "env") or (source and variable):
            raise InvalidArgumentError("--secret", repr(text), "write it as id=ID[,src=FILE|,env=VARIABLE]")
        if kind == "env" and source:
            variable, source = source, ""  # what buildx means by a source then
        if not source and not variable:
            is_variable = kind == "env" or (kind is None and name in environ)
            variable, source = (name, "") if is_variable else ("", name)
        found[name] = _variable(text, variable, environ) if variable else _file(text, source)
    return found


def _variable(text: str, variable: str, environ: Mapping[str, str]) -> bytes:
    if variable not in environ:
        raise InvalidArgumentError("--secret", repr(text), f"the environment has no {variable}")
    return os.fsencode(environ[variable])


def _file(text: str, source: str) -> Path:
    path = Path(source).expanduser().absolute()
    try:
        with path.open("rb"):
            return path
    except OSError as exc:
        raise InvalidArgumentError("--secret", repr(text), f"{path}: {exc.strerror or exc}") from exc


def outputs(output: Sequence[str], tags: Sequence[str], *, push: bool) -> Outputs:
    """Return where what is built goes.

    Args:
        output: ``oci:DIR``, ``oci-archive:FILE``, ``local:DIR``, a directory alone, or in buildx's form
            ``type=local,dest=DIR``, ``type=oci,dest=FILE[,tar=false]``, ``type=image,name=NAME[,push=true]``,
            ``type=registry[,name=NAME]``.
        tags: Names of the image.
        push: Push it under each of them.

    Raises:
        InvalidReferenceError: a name doesn't parse, or has a digest.
        InvalidArgumentError: an output can't be meant, or there is no name to push to.
    """
    exports: list[str] = []
    named = {reference.name: reference for reference in map(_tag, tags)}
    pushed = set(named) if push else set()
    pushes_all = push
    for text in output:
        export, names, is_pushed = _output(text)
        if export:
            exports.append(export)
        for reference in names:
            named.setdefault(reference.name, reference)
        if is_pushed:
            pushes_all = pushes_all or not names
            pushed |= {reference.name for reference in names} or set(named)
    if pushes_all and not pushed:
        raise InvalidArgumentError("--push", "given without a name", "say with --tag where to: HOST/REPOSITORY:TAG")
    return Outputs(
        exports=tuple(dict.fromkeys(exports)),
        tags=tuple(named.values()),
        pushes=tuple(reference for name, reference in named.items() if name in pushed),
    )


def _tag(text: str) -> ImageReference:
    reference = parse_reference(text)
    if reference.digest is not None:
        raise InvalidReferenceError(text, "what is built has a digest of its own: leave it out")
    return reference


def _output(text: str) -> tuple[str, tuple[ImageReference, ...], bool]:
    """Return an output's export, its names, and whether it is pushed."""
    kind, colon, path = text.partition(":")
    if colon and kind in _EXPORTS:
        return f"{kind}:{_path(text, path)}", (), False
    if "=" not in text:
        return f"local:{_path(text, text)}", (), False
    fields = _fields("--output", text, {"type", "dest", "name", "push", "tar"})
    names = tuple(_tag(name.strip()) for name in fields.get("name", "").split(",") if name.strip())
    match fields.get("type"):
        case "local":
            return f"local:{_path(text, fields.get('dest', ''))}", (), False
        case "oci":
            kind = "oci-archive" if _is_true(text, fields.get("tar", "true")) else "oci"
            return f"{kind}:{_path(text, fields.get('dest', ''))}", (), False
        case "registry":
            return "", names, True
        case "image":
            return "", names, _is_true(text, fields.get("push", "false"))
        case other:
            reason = f"its type is {other or 'missing'}; local, oci, image and registry are supported"
            raise InvalidArgumentError("--output", repr(text), reason)


def _path(text: str, path: str) -> str:
    if not path or path == "-":
        raise InvalidArgumentError("--output", repr(text), "it names no file or directory")
    return str(Path(path).expanduser().absolute())


def _is_true(text: str, value: str) -> bool:
    if value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    raise InvalidArgumentError("--output", repr(text), f"{value!r} is neither true nor false")


def _fields(option: str, text: str, known: set[str]) -> dict[str, str]:
    """Split ``key=value,key=value``; a value with commas is in double quotes with its key, as in CSV."""
    fields: dict[str, str] = {}
    for part in _split(option, text):
        key, equals, value = part.partition("=")
        key = key.strip().lower()
        if not equals:
            raise InvalidArgumentError(option, repr(text), f"{part!r} is not KEY=VALUE")
        if key not in known:
            raise InvalidArgumentError(option, repr(text), f"{key} is not supported; it has {', '.join(sorted(known))}")
        fields[key] = value
    return fields


def _split(option: str, text: str) -> list[str]:
    import csv  # noqa: PLC0415 - only these options need it

    try:
        return next(csv.reader([text], strict=True), [])
    except csv.Error as exc:
        raise InvalidArgumentError(option, repr(text), str(exc)) from exc
