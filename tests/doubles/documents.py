"""What commands print, checked against the shapes that ``lazyfarm/cli/documents.py`` promises."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import typer
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from lazyfarm.cli.documents import DOCUMENTS, PROGRESS, Failure, schema
from lazyfarm.cli.main import app

_USAGE = 2


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


def check_output(words: Sequence[str], stdout: str, stderr: str, status: int) -> None:
    """Check what a command printed to no terminal: documents as promised, and nothing that moves or colours."""
    modes = {word for before, word in pairwise(words) if before == "--progress"}
    if "json" in modes:
        read_progress(stdout)
    elif "--json" in words and words[0] != "submit" and "--help" not in words:
        _check_documents(tuple(words), stdout, status)
    if "tty" not in modes:
        assert "\x1b" not in stdout + stderr, f"{words}: an escape sequence in a pipe"


def _check_documents(words: tuple[str, ...], text: str, status: int) -> None:
    lines = text.splitlines()
    if status == _USAGE:
        assert not lines, f"{words}: wrong usage is told on stderr"
        return
    if words[0] != "audit":
        assert len(lines) == 1, f"{words}: {len(lines)} lines, not one document"
    for line in lines:
        document = json.loads(line)
        if isinstance(document.get("error"), dict):
            assert status in (1, 130), f"{words}: an error, and exit status {status}"
            _check("failure", document)
        else:
            check_document(words, document)


@pytest.fixture(scope="session", autouse=True)
def _checked() -> Iterator[None]:
    """Check every command that any test runs within this process."""
    invoke = CliRunner.invoke

    def checked(self: CliRunner, called: Any, args: Any = None, **options: Any) -> Any:
        result = invoke(self, called, args, **options)
        # An exception that no command turned into an exit status is the test's own affair.
        if called is app and args and (result.exception is None or isinstance(result.exception, SystemExit)):
            check_output(args, result.stdout, result.stderr, result.exit_code)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CliRunner, "invoke", checked)
        yield


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
