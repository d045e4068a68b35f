"""What commands print, checked against the shapes that ``lazyfarm/cli/documents.py`` promises."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import typer
from jsonschema import Draft202012Validator

from lazyfarm.cli.documents import DOCUMENTS, PROGRESS, Failure, schema
from lazyfarm.cli.main import app


def commands() -> dict[str, Any]:
    """Return each command that does something, by its words: ``refs ls``."""
    found: dict[str, Any] = {}
    open_groups: list[tuple[tuple[str, ...], Any]] = [((), typer.main.get_command(app))]
    while open_groups:
        path, command = open_groups.pop()
        if not hasattr(command, "list_commands"):
            found[" ".join(path)] = command
            continue
        with command.make_context("lazyfarm", [], resilient_parsing=True) as context:
            names = command.list_commands(context)
            open_groups += [((*path, name), command.get_command(context, name)) for name in names]
    return found


def check_document(arguments: tuple[str, ...], document: object) -> None:
    """Assert that a command's document is what its schema says: no key is missing, and none is said nowhere."""
    names = [" ".join(arguments[:words]) for words in (2, 1)]
    _check(next(name for name in names if name in DOCUMENTS), document)


def read_document(arguments: tuple[str, ...], text: str) -> dict[str, Any]:
    """Return what a command printed with ``--json``, which is the document of one that succeeded or failed."""
    document: dict[str, Any] = json.loads(text)
    if "error" in document:
        _check("failure", document)
    else:
        check_document(arguments, document)
    return document


def read_progress(text: str) -> list[dict[str, Any]]:
    """Return the lines of ``--progress json``, each as its schema says."""
    told = [json.loads(line) for line in text.splitlines()]
    for line in told:
        _check("progress", line)
    return told


def _check(name: str, document: object) -> None:
    faults = [f"{fault.json_path}: {fault.message}" for fault in _validator(name).iter_errors(document)]
    assert not faults, (name, faults)


@cache
def _validator(name: str) -> Draft202012Validator:
    shape = {"failure": Failure, "progress": PROGRESS, **DOCUMENTS}[name]
    return Draft202012Validator(_closed(schema(shape)))


def _closed(part: Any) -> Any:
    """Return a schema that allows no key that it doesn't name: readers shall ignore those, but each has to be said."""
    if isinstance(part, list):
        return [_closed(one) for one in part]
    if not isinstance(part, dict):
        return part
    closed = {key: _closed(value) for key, value in part.items()}
    if isinstance(part.get("properties"), dict) and part.get("type") == "object":
        closed["additionalProperties"] = False
    return closed
