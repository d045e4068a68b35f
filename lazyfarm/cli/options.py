"""Options that every command has.

Paths are declared as texts: see :mod:`lazyfarm.cli.quick`.
"""

from __future__ import annotations

from typing import Annotated, TypeAlias

import typer

from lazyfarm.cli import completing

StateDirOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--state-dir",
        metavar="DIR",
        help="The farm's directory. Default: $LAZYFARM_STATE_DIR, else ~/.local/state/lazyfarm.",
        show_default=False,
    ),
]
JsonOption: TypeAlias = Annotated[
    bool, typer.Option("--json", help="Print one JSON document, and nothing else, to stdout.")
]
PlainHttpOption: TypeAlias = Annotated[
    bool, typer.Option("--plain-http", help="Talk to the registry over plain HTTP, for this call.")
]
JobArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="A job's ID, or the start of one.",
        show_default=False,
        autocompletion=completing.jobs,
    ),
]
ProgressOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--progress",
        metavar="MODE",
        autocompletion=completing.one_of("auto", "plain", "tty", "json"),
        help="auto (tty on a terminal, else plain), plain, tty, or json: one object for each event, and nothing else.",
    ),
]
RefArgument: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="A ref's ID, the start of one, or an image that was pulled.",
        show_default=False,
        autocompletion=completing.refs,
    ),
]


def command_app() -> typer.Typer:
    """Return the Typer app of one noun, set up as all of them are."""
    return typer.Typer(
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def example(*lines: str) -> str:
    """Return a command's examples, as the end of its help."""
    return "\n".join(("\b", "Example:", *(f"  {line}" for line in lines)))  # \b: click leaves the lines as they are
