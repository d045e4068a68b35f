"""Every command on a real farm, for programs and for people: documents as their schemas say, words without colours.

In this process, which joins the farm once; that commands are processes of their own is for ``test_cli.py``.
"""

import json
import os
import secrets

import pytest
from typer.testing import CliRunner

from lazyfarm.cli.documents import DOCUMENTS
from lazyfarm.cli.main import app
from tests.doubles.documents import check_document, read_document, read_progress
from tests.doubles.shell_image import shell_image

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="containers need root"),
    pytest.mark.timeout(240),
]

#: These need a process of their own: what they print is checked in their own tests. And lines.
ELSEWHERE = {"up", "gateway", "submit", "audit"}


class Commands:
    """Runs commands, and remembers which documents were seen."""

    def __init__(self):
        self.seen = set()

    def run(self, *arguments, statuses=(0,)):
        """Run a command that ends with one of *statuses*."""
        result = CliRunner().invoke(app, list(arguments), prog_name="lazyfarm")
        assert result.exit_code in statuses, (arguments, result.output)
        return result

    def document(self, *arguments, statuses=(0,)):
        """Return a command's document, which has the shape that is promised."""
        name = next(name for name in (" ".join(arguments[:2]), arguments[0]) if name in DOCUMENTS)
        words = len(name.split())
        told = read_document(
            arguments, self.run(*arguments[:words], "--json", *arguments[words:], statuses=statuses).stdout
        )
        assert "error" not in told, told
        self.seen.add(name)
        return told

    def __call__(self, *arguments, statuses=(0,)):
        """Return its document; run again, it has words for people, without colours though these are asked for."""
        told = self.document(*arguments, statuses=statuses)
        result = self.run(*arguments, statuses=statuses)
        assert result.stdout
        assert "\x1b" not in result.output, arguments
        return told


@pytest.fixture
def commands(farm, monkeypatch):
    """The command line of the shared farm, in a pipe whose reader is said to like colours."""
    for name, value in {**farm.environ, "LAZYFARM_STATE_DIR": str(farm.state_dir)}.items():
        monkeypatch.setenv(name, value)
    for name in ("FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    return Commands()


def test_every_command_prints_what_its_schema_says(commands, registry, tmp_path):
    """From an image to a build and what is kept of both; the list of commands leaves none out."""
    registry.push("documents/base", "1", shell_image(secrets.token_hex(8)))
    image = f"{registry.host}/documents/base:1"
    ref = commands("pull", image)["ref"]
    commands("refs", "show", ref)
    commands("refs", "ls")
    commands("explain", "wait", ref)
    commands("explain", "pull", ref)
    commands("unlazy", ref)
    commands("extract", ref)
    commands("push", ref, f"{registry.host}/documents/copy:1")

    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text(f"FROM {image}\nRUN echo said {secrets.token_hex(4)}\n")
    built = commands("build", "--tag", f"{registry.host}/documents/built:1", "--push", str(context))
    assert built["images"][0]["pushed"]
    commands("jobs", "ls")
    assert commands("jobs", "show", built["job"])["vertices"]
    assert commands.document("jobs", "logs", built["job"])["logs"]
    commands("attach", built["job"])
    lines = read_progress(commands.run("attach", "--progress", "json", built["job"]).stdout)
    assert {"vertex", "log", "layer", "end"} <= {line["event"] for line in lines}
    commands("explain", "miss", "RUN echo")
    commands("report", "--output", str(tmp_path / "report.html"), built["job"])
    (context / "Dockerfile").write_text(f"FROM {image}\nRUN echo {secrets.token_hex(4)}; sleep 600\n")
    left = commands.document("build", "--detach", str(context))
    commands("jobs", "cancel", left["job"])

    pin = commands("leases", "pin", ref, "--ttl", "1h")["id"]
    commands("leases", "ls")
    commands("leases", "show", pin)
    commands("explain", "kept", ref)
    pins = [lease["id"] for lease in commands.document("leases", "ls")["leases"] if lease["id"].startswith("pin-")]
    commands.document("leases", "release", *pins)
    commands("leases", "leaks", statuses=(0, 1))
    for where in ((), ("--nodes",)):
        commands("du", *where)
        commands("prune", "--dry-run", *where)
    commands("verify", ref)
    commands("verify", "--quarantine")

    commands("status")
    commands("top", "--every", "0.1")
    commands("page")
    commands("doctor", statuses=(0, 1))
    commands("config", "explain", "cache")
    commands("config", "show")
    for line in commands.run("audit", "--json").stdout.splitlines():
        check_document(("audit",), json.loads(line))
    commands("drain", "n2", "--timeout", "30")
    commands("drain", "n2", "--undo")
    commands("down", "--state-dir", str(tmp_path / "nowhere"))
    assert commands.seen | ELSEWHERE == set(DOCUMENTS)
