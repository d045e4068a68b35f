"""``lazyfarm``: the entry point, which imports a command's file only when it is called."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lazyfarm.cli.completing import words_of_bash
from lazyfarm.cli.options import example
from lazyfarm.cli.quick import spare_pydantic

#: In the order of `lazyfarm --help`: from nothing to a pushed image, then what looks after it.
COMMANDS = (
    *("up", "down", "status", "top", "doctor", "page", "gateway"),
    *("pull", "refs", "unlazy", "extract", "push"),
    *("build", "jobs", "attach", "report", "submit"),
    *("du", "prune", "verify", "leases", "explain", "audit", "drain", "config"),
)


class LazyGroup(TyperGroup):
    """Commands by name. Importing all of them would cost each a tenth of a second."""

    # Any: typer's vendored click has no public name, and older releases use click itself.

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002 - click's signature
        """Return every command, in order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002 - likewise
        """Import the command's file."""
        if cmd_name not in COMMANDS:
            return None
        return typer.main.get_command(import_module(f"lazyfarm.cli.{cmd_name}").app)


spare_pydantic()
app = typer.Typer(
    name="lazyfarm",
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode=None,  # plain help: rich would cost every --help 0.1 s
    pretty_exceptions_enable=False,  # the boundary prints one line
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_wanted: bool) -> None:  # noqa: FBT001 - typer's callback signature
    if is_wanted:
        from lazyfarm import __version__  # noqa: PLC0415 - read from the installed package when asked for

        typer.echo(f"lazyfarm {__version__}")
        raise typer.Exit


@app.callback(epilog=example("lazyfarm up --nodes 3", "lazyfarm pull debian:12", "lazyfarm extract debian:12"))
def lazyfarm(
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the release and exit.")
    ] = False,
) -> None:
    """Keep container layers lazy, and fetch each once for the whole cluster.

    Exit status: 0 done, 1 error, 2 wrong usage, 130 interrupted.
    """


def run() -> None:
    """Run the command line and exit."""
    # Ray imports it where it is installed, and a first call waits for that, 0.25 s. No command has a table to send.
    sys.modules.setdefault("pyarrow", None)  # type: ignore[arg-type]  # by this an import finds nothing
    try:
        with words_of_bash():
            app(prog_name="lazyfarm")
    except KeyboardInterrupt:  # before a command began, while it was being imported
        sys.stderr.write("interrupted\n")
        sys.exit(130)
