"""What the options of ``lazyfarm build`` mean: docker's and buildx's forms, checked before anything else is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.errors import InvalidArgumentError, InvalidReferenceError
from cluster.reference import ImageReference, parse_reference
from lazyfarm.outputs import STDOUT, Output, OutputKind, parse_output


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where what is built goes."""

    #: What is written to this machine.
    exports: tuple[Output, ...]
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


def build_contexts(texts: Sequence[str]) -> dict[str, str]:
    """Return build contexts from ``NAME=WHERE``.

    Raises:
        InvalidArgumentError: one is not of that form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, where = text.partition("=")
        if not name.strip() or not where:
            raise InvalidArgumentError(
                "--build-context", repr(text), "write it as NAME=DIR, or NAME=docker-image://IMAGE"
            )
        if name in found:
            raise InvalidArgumentError("--build-context", repr(text), f"the name {name} is given twice")
        found[name] = where
    return found


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
        output: As :func:`lazyfarm.outputs.parse_output` has them.
        tags: Names of the image.
        push: Push it under each of them.

    Raises:
        InvalidReferenceError: a name doesn't parse, or has a digest.
        InvalidOutputError: an output can't be meant.
        InvalidArgumentError: there is no name to push to, or several outputs go to standard output.
    """
    exports: dict[Output, None] = {}
    named = {reference.name: reference for reference in map(_tag, tags)}
    pushed = set(named) if push else set()
    pushes_all = push
    for text in output:
        parsed = parse_output(text)
        names = [_tag(name) for name in parsed.names]
        if parsed.kind is not OutputKind.IMAGE:
            exports[parsed if parsed.dest == STDOUT else replace(parsed, dest=_path(parsed.dest))] = None
            continue
        for reference in names:
            named.setdefault(reference.name, reference)
        if parsed.push:
            pushes_all = pushes_all or not names
            pushed |= {reference.name for reference in names} or set(named)
    if sum(export.dest == STDOUT for export in exports) > 1:
        raise InvalidArgumentError("--output", "several", "one alone can go to standard output")
    if pushes_all and not pushed:
        raise InvalidArgumentError("--push", "given without a name", "say with --tag where to: HOST/REPOSITORY:TAG")
    return Outputs(
        exports=tuple(exports),
        tags=tuple(named.values()),
        pushes=tuple(reference for name, reference in named.items() if name in pushed),
    )


def _tag(text: str) -> ImageReference:
    reference = parse_reference(text)
    if reference.digest is not None:
        raise InvalidReferenceError(text, "what is built has a digest of its own: leave it out")
    return reference


def _path(text: str) -> str:
    return str(Path(text).expanduser().absolute())


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
