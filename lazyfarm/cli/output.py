"""What a command prints: one JSON document, or lines and tables for people."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

from lazyfarm.cli.terminal import one_line, visible

_Rows = Sequence[Sequence[str]]


class Output:
    """A command's stdout and stderr; with *as_json*, everything but the document is left unsaid."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        # Kept: while a command acts, sys.stdout is turned away from what libraries may print.
        self.stdout: TextIO = sys.stdout
        self.stderr: TextIO = sys.stderr

    @property
    def is_live(self) -> bool:
        """Tell whether a display that redraws itself has somewhere to be."""
        return not self.as_json and self.stdout.isatty()

    @contextlib.contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Keep what libraries print from getting between a document and its reader: Ray tells of nodes on stdout."""
        with contextlib.redirect_stdout(self.stderr if self.as_json else sys.stdout):
            yield

    def document(self, document: Mapping[str, object]) -> None:
        """Print the command's JSON document, if it was asked for."""
        if self.as_json:
            self._write(self.stdout, json.dumps(document, ensure_ascii=False))

    def line(self, text: str, *, colours: bool = False) -> None:
        """Print a line for people. What it quotes doesn't steer their terminal; *colours* of its own may stay."""
        if not self.as_json:
            self._write(self.stdout, "\n".join(visible(line, colours=colours) for line in text.split("\n")))

    def table(self, headers: Sequence[str], rows: _Rows, *, numbers: Sequence[str] = ()) -> None:
        """Print a table for people; columns named in *numbers* are aligned to the right.

        Plain text on a terminal, too: it wraps a long digest or path without breaking it, so that it can be copied.
        """
        for row in _aligned([headers, *rows], [header in numbers for header in headers]):
            self.line(row)

    def fields(self, fields: _Rows) -> None:
        """Print names and values for people, one a line."""
        for row in _aligned(fields, (False, False)):
            self.line(row)

    def error(self, type_name: str, message: str, hint: str) -> None:
        """Print an error: one line on stderr, or the error document on stdout."""
        message, hint = one_line(message), one_line(hint)
        if self.as_json:
            self.document({"error": {"type": type_name, "message": message, "hint": hint}})
        else:
            self._write(self.stderr, f"error: {message}" + (f" (hint: {hint})" if hint else ""))

    @staticmethod
    def _write(stream: TextIO, text: str) -> None:
        stream.write(text + "\n")
        stream.flush()


def _aligned(rows: _Rows, is_number: Sequence[bool]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(is_number))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_number, strict=True)
        ).rstrip()
        for row in rows
    ]
