"""How the documentation becomes a site: ``make docs``. What is generated from the code is made here, first."""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

project = "lazyfarm"
release = metadata.version("lazyfarm")
copyright = "the lazyfarm authors"  # noqa: A001 - Sphinx's name
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
#: The last is the head of a page that is made here.
exclude_patterns = ["_build", "reference/documents.md"]
html_theme = "furo"
html_title = "lazyfarm"
myst_enable_extensions = ["colon_fence"]
#: Links to headings, as in `operations.md#upgrading`.
myst_heading_anchors = 3
autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
#: Examples in prose are console sessions and fragments, which no lexer knows.
suppress_warnings = ["misc.highlighting_failure"]


def _command_pages(app: Any) -> None:
    """Write the help of every command, as the command prints it."""
    from lazyfarm.cli.main import COMMANDS  # noqa: PLC0415
    from lazyfarm.cli.main import app as main  # noqa: PLC0415

    parts = ["# Commands", "", "As `lazyfarm COMMAND --help` says it.", ""]
    commands = [((), typer.main.get_command(main))]
    commands += [
        ((name,), typer.main.get_command(importlib.import_module(f"lazyfarm.cli.{name}").app)) for name in COMMANDS
    ]
    while commands:
        path, command = commands.pop(0)
        name = " ".join(("lazyfarm", *path))
        with command.make_context(name, [], resilient_parsing=True) as context:
            context.max_content_width = 100
            parts += [f"## `{name}`", "", "```text", command.get_help(context).rstrip(), "```", ""]
            if path:
                below = [((*path, sub), command.get_command(context, sub)) for sub in getattr(command, "commands", ())]
                commands = below + commands
    (Path(app.srcdir) / "reference" / "commands.md").write_text("\n".join(parts))


def _configuration_page(app: Any) -> None:
    """Write what each key means, from the file that has them all."""
    from lazyfarm.config_reference import every_key  # noqa: PLC0415

    parts = ["# Configuration", "", "As [`configs/default.toml`](../../configs/default.toml) says it, and", ""]
    parts += ["`lazyfarm config explain KEY`.", ""]
    section = ""
    for key in every_key():
        if (found := key.key.rpartition(".")[0]) != section:
            section = found
            parts += [f"## `[{section}]`", ""]
        parts += [f"`{key.key}`", f": {key.text}", "", f"  Default `{key.default}`; environment `{key.variable}`.", ""]
    (Path(app.srcdir) / "reference" / "configuration.md").write_text("\n".join(parts))


def _documents_page(app: Any) -> None:
    """Write what each command prints as JSON, and how it ends, from the shapes that tests check it with."""
    from lazyfarm.cli.documents import DOCUMENTS, EXIT_STATUSES, PROGRESS, Failure, schema  # noqa: PLC0415

    said = (Path(app.srcdir) / "reference" / "documents.md").read_text().rstrip()
    parts = [said, "", "## Exit statuses", "", "| status | meaning |", "| --- | --- |"]
    parts += [f"| {status} | {meaning} |" for status, meaning in EXIT_STATUSES.items()]
    shapes = {"a command that fails": Failure, "a line of `--progress json`": PROGRESS}
    shapes |= {f"`lazyfarm {name} --json`": shape for name, shape in DOCUMENTS.items()}
    for name, shape in shapes.items():
        parts += ["", f"## Schema of {name}", "", "```json", json.dumps(schema(shape), indent=2), "```"]
    (Path(app.srcdir) / "reference" / "json.md").write_text("\n".join([*parts, ""]))


def _methods_as_called(_app: Any) -> None:
    """Show methods as who calls them sees them: that there are two kinds of farms is not his business."""
    from lazyfarm.farm import Farm  # noqa: PLC0415

    for each in vars(Farm).values():
        if inspect.isfunction(each):
            each.__isabstractmethod__ = False


def setup(app: Any) -> None:
    """Have all made before anything is read."""
    app.connect("builder-inited", _command_pages)
    app.connect("builder-inited", _configuration_page)
    app.connect("builder-inited", _documents_page)
    app.connect("builder-inited", _methods_as_called)
