"""``lazyfarm config``: what can be set, and what is."""

from __future__ import annotations

import json
import os
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from lazyfarm.cli import completing
from lazyfarm.cli.boundary import reporting
from lazyfarm.cli.options import JsonOption, StateDirOption, command_app, example

if TYPE_CHECKING:
    from lazyfarm.cli import documents
    from lazyfarm.config_reference import KeyReference

app = command_app()

_WIDTH = 100


@app.callback(epilog=example("lazyfarm config explain cache.keep_s", "lazyfarm config show"))
def config() -> None:
    """Explain the configuration's keys, and show what is set."""


@app.command("explain", epilog=example("lazyfarm config explain cache.keep_s", "lazyfarm config explain fetch"))
def explain_key(
    *,
    key: Annotated[
        str,
        typer.Argument(
            metavar="[KEY]",
            help="SECTION.KEY, a key alone, or a section. Default: every key.",
            autocompletion=completing.config_keys,
        ),
    ] = "",
    state_dir: StateDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a key means, its unit, range and default, and what it is set to here."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        from lazyfarm.config_reference import every_key, explain  # noqa: PLC0415 - not for --help

        found = explain(key) if key else every_key()
        set_here = _set(state_dir)
        out.document({"keys": [_document(reference, set_here) for reference in found]})
        for reference in found:
            out.line(f"{reference.key} = {_value(reference, set_here)}")
            for line in textwrap.wrap(reference.text, _WIDTH, initial_indent="  ", subsequent_indent="  "):
                out.line(line)
            out.line(f"  default {reference.default}; environment {reference.variable}")


@app.command("show", epilog=example("lazyfarm config show --json"))
def show(*, state_dir: StateDirOption = None, as_json: JsonOption = False) -> None:
    """Show what differs from the defaults: of the running farm, or of what `up` would be told by the environment."""
    with reporting(as_json=as_json, state_dir=state_dir) as out:
        set_here = _set(state_dir)
        out.document({"set": set_here})
        for name, value in set_here.items():
            out.line(f"{name} = {json.dumps(value)}")
        if not set_here:
            out.line("every key has its default")


def _set(state_dir: str | None) -> dict[str, object]:
    """Return the keys that differ from their defaults, flat."""
    from cluster.config_record import non_defaults  # noqa: PLC0415 - not for --help
    from lazyfarm.settings import load_settings  # noqa: PLC0415 - likewise

    flat: dict[str, object] = {}
    for section, table in non_defaults(load_settings(state_dir, None, os.environ).config).items():
        for key, value in table.items():
            if isinstance(value, dict):
                flat.update({f'{section}."{key}".{name}': held for name, held in value.items()})
            else:
                flat[f"{section}.{key}"] = value
    return flat


def _value(reference: KeyReference, set_here: dict[str, object]) -> str:
    return json.dumps(set_here[reference.key]) if reference.key in set_here else reference.default


def _document(reference: KeyReference, set_here: dict[str, object]) -> documents.ConfigKey:
    return {
        "key": reference.key,
        "default": reference.default,
        "set": set_here.get(reference.key),
        "environment": reference.variable,
        "text": reference.text,
    }
