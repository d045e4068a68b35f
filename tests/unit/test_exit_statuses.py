"""How commands end, and what every test that runs one has checked of what it prints."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lazyfarm.cli import boundary, parts
from lazyfarm.cli.documents import EXIT_STATUSES
from lazyfarm.cli.main import app
from tests.doubles.documents import check_output

COMMANDS = Path(__file__).parents[2] / "lazyfarm" / "cli"


def test_exit_statuses_are_what_the_table_says(tmp_path, monkeypatch):
    """One run for each row, and no row without one."""

    def interrupted(state_dir):
        raise KeyboardInterrupt

    def status(*words):
        return CliRunner().invoke(app, [*words, "--state-dir", str(tmp_path)]).exit_code

    seen = {status("down"), status("status"), status("pull")}
    monkeypatch.setattr(parts, "_running_settings", interrupted)
    seen.add(status("status"))
    assert seen == EXIT_STATUSES.keys() == {0, boundary.EXIT_ERROR, 2, boundary.EXIT_INTERRUPTED}


def test_no_command_has_an_exit_status_of_its_own():
    """Each is left by a name of the boundary; `submit` alone hands on its script's."""
    found = {}
    for file in sorted(COMMANDS.glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.Exit" and node.args:
                found.setdefault(ast.unparse(node.args[0]), set()).add(file.stem)
    own = {said: files for said, files in found.items() if said not in {"EXIT_ERROR", "EXIT_INTERRUPTED"}}
    assert len(found) > len(own)
    assert list(own.values()) == [{"submit"}]


@pytest.mark.parametrize(
    ("words", "stdout", "status", "wrong"),
    [
        (["down", "--json"], '{"stopped": []}\n{"stopped": []}\n', 0, "2 lines"),
        (["down", "--json"], "", 0, "0 lines"),
        (["down", "--json"], '{"stopped": [], "left": []}', 0, "'left' was unexpected"),
        (["down", "--json"], "{}", 0, "'stopped' is a required property"),
        (["down", "--json"], '{"error": {"type": "X", "message": "y", "hint": ""}}', 0, "an error, and exit status 0"),
        (["down", "--json"], '{"error": {"type": "X", "message": "y"}}', 1, "'hint' is a required property"),
        (["down"], "\x1b[31mstopped\x1b[0m\n", 0, "an escape sequence in a pipe"),
    ],
)
def test_what_a_script_would_stumble_over_is_seen(words, stdout, status, wrong):
    """By every test that runs a command."""
    with pytest.raises(AssertionError, match=wrong):
        check_output(words, stdout, "", status)
