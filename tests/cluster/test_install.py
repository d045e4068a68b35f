"""Installed as people do: a wheel in an environment of its own, used, upgraded under a running farm, taken away."""

import json
import os
import secrets
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from storage.services.process import FARM_MARK, marked_pids
from tests.doubles.farm import FAST
from tests.doubles.registry import random_image
from tests.doubles.wheels import build_wheel, install, uv

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.timeout(400)]

NEXT = "0.1.1"


@dataclass
class Installed:
    """An environment that has lazyfarm, and a farm that is brought up from it."""

    venv: Path
    state_dir: Path

    def run(self, *arguments):
        """Run the command line, from a directory that is not the project's."""
        return subprocess.run(
            [self.venv / "bin" / "lazyfarm", *arguments],
            cwd=self.venv.parent,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def json(self, *arguments):
        """Run a command that succeeds; return its document."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: {done.stdout}\n{done.stderr}"
        return json.loads(done.stdout)

    def driver(self, text, *arguments):
        """Start a driver script."""
        return subprocess.Popen(
            [self.venv / "bin" / "python", "-c", text, *arguments],
            cwd=self.venv.parent,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def _environment(self):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))}
        return {**kept, **FAST, "LAZYFARM_STATE_DIR": str(self.state_dir)}


@pytest.fixture
def installed():
    """An environment with this release, where nothing runs in the end."""
    # Short, for the sake of Unix sockets.
    root = Path(tempfile.mkdtemp(prefix="lf-inst-"))
    made = Installed(root / "venv", root / "farm")
    uv("venv", "-q", "--python", shutil.which("python3") or "python3", made.venv)
    install(made.venv, build_wheel(root))
    yield made
    made.run("down", "--purge")
    shutil.rmtree(root, ignore_errors=True)


def pull(installed, registry):
    """Pull an image nobody has seen, and leave it lazy; return its name and its ref."""
    repository = f"installed/{secrets.token_hex(4)}"
    registry.push(repository, "1", random_image(secrets.randbits(64), layers=2))
    name = f"{registry.host}/{repository}:1"
    return name, installed.json("pull", name)["ref"]


_DRIVER = """
import sys
from lazyfarm.blocking import Farm
with Farm.connect() as farm:
    print(farm.pull(sys.argv[1]).id, flush=True)
    for name in sys.stdin:
        ref = farm.pull(name.strip())
        print(ref.extract().path, flush=True)
"""


def test_a_farm_is_installed_upgraded_while_it_works_and_taken_away(installed, registry):
    """From a wheel alone. The next release finds refs, leases and jobs; who drives the old one works on meanwhile."""
    assert installed.run("--version").stdout == "lazyfarm 0.1.0\n"
    up = installed.json("up", "--nodes", "1")
    assert {actor["name"].partition("@")[2] for actor in up["actors"]} == {"0.1.0"}
    lazy, lazy_ref = pull(installed, registry)
    present, present_ref = pull(installed, registry)
    extracted = installed.json("extract", present_ref)["nodes"][0]["path"]
    pinned = installed.json("leases", "pin", lazy_ref)
    with installed.driver(_DRIVER, lazy) as driver:
        assert driver.stdout.readline().strip() == lazy_ref

        install(installed.venv, build_wheel(installed.venv.parent, NEXT), "--no-deps")
        assert installed.run("--version").stdout == f"lazyfarm {NEXT}\n"
        again = installed.json("up")
        assert {actor["name"].partition("@")[2] for actor in again["actors"]} == {"0.1.0", NEXT}
        assert again["redis"] == up["redis"]
        assert "problems" not in installed.json("status")

        # The old driver, at the old actors, and the new command at the new ones, on one farm.
        name, _ = pull(installed, registry)
        driver.stdin.write(f"{name}\n")
        driver.stdin.flush()
        assert Path(driver.stdout.readline().strip(), "data-0").exists()
        driver.stdin.close()
        assert driver.wait(timeout=60) == 0

    refs = {ref["ref"]: ref["lazy"] for ref in installed.json("refs", "ls")["refs"]}
    assert (refs[lazy_ref], refs[present_ref]) == (True, False)
    assert pinned["id"] in {lease["id"] for lease in installed.json("leases", "ls")["leases"]}
    layers = installed.json("unlazy", present_ref)["layers"]
    assert {layer["source"] for layer in layers} == {"present"}
    assert installed.json("extract", present)["nodes"][0]["path"] == extracted

    mark = (installed.state_dir / "farm-id").read_text().strip()
    assert marked_pids({FARM_MARK: mark})
    installed.json("down", "--purge")
    assert not marked_pids({FARM_MARK: mark})
    assert not installed.state_dir.exists()
    assert str(installed.venv.parent) not in Path("/proc/mounts").read_text()
