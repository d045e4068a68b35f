"""What a container of the node image runs, with stand-ins for Ray and lazyfarm that say how they were called."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

ENTRY = Path(__file__).parents[2] / "configs" / "image" / "lazyfarm-node"
#: Tells its arguments, a line of JSON; `ray` then stays until it is ended, or ends as it is told.
STAND_IN = """\
#!/usr/bin/env python3
import json, os, pathlib, signal, sys
name = pathlib.Path(sys.argv[0]).name
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, *sys.argv[1:]]) + "\\n")
if name == "ray":
    if "RAY_ENDS" in os.environ:
        sys.exit(int(os.environ["RAY_ENDS"]))
    while True:
        signal.pause()
"""


class Entry:
    """The entry program, run on stand-ins."""

    def __init__(self, directory: Path) -> None:
        self._calls = directory / "calls"
        for name in ("ray", "lazyfarm"):
            program = directory / name
            program.write_text(STAND_IN)
            program.chmod(0o755)
        self._env = {"PATH": f"{directory}:{os.environ['PATH']}", "CALLS": str(self._calls)}

    def start(self, *arguments: str, **env: str) -> subprocess.Popen[str]:
        """Start it."""
        return subprocess.Popen(
            [ENTRY, *arguments], env={**self._env, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def calls(self, count: int) -> list[list[str]]:
        """Wait until *count* programs were called; return their names and arguments, Ray's first."""
        give_up_s = time.monotonic() + 30
        while time.monotonic() < give_up_s:
            lines = self._calls.read_text().splitlines() if self._calls.exists() else []
            if len(lines) == count:
                return sorted((json.loads(line) for line in lines), reverse=True)
            time.sleep(0.01)
        raise AssertionError(lines)


@pytest.fixture
def entry(tmp_path):
    return Entry(tmp_path)


def end(process):
    """End it as a container is ended; return its status."""
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    return process.returncode


def test_a_head_starts_ray_and_the_farm(entry):
    """With the options that are given, and until SIGTERM, which Ray is told."""
    process = entry.start("head", "--num-cpus=2", LAZYFARM_CONFIG="/etc/lazyfarm/farm.toml")
    ray, farm = entry.calls(2)
    assert ray == ["ray", "start", "--head", "--port=6379", "--block", "--disable-usage-stats", "--num-cpus=2"]
    assert farm == ["lazyfarm", "up", "--config", "/etc/lazyfarm/farm.toml"]
    assert end(process) == 0


def test_a_node_joins_the_head_under_its_name(entry):
    """And brings no farm up: that is the head's."""
    process = entry.start("node", "head.internal:6379", LAZYFARM_NODE="machine-1")
    (ray,) = entry.calls(1)
    address, label = "--address=head.internal:6379", "--labels=lazyfarm-node=machine-1"
    assert ray == ["ray", "start", "--block", "--disable-usage-stats", address, label]
    assert end(process) == 0


def test_kuberays_command_is_what_starts_ray(entry):
    """As a shell reads it: custom resources are JSON in quotes."""
    command = """ray start --address=head-svc:6379 --block --resources='{"disk": 1}'"""
    process = entry.start("node", KUBERAY_GEN_RAY_START_CMD=command)
    (ray,) = entry.calls(1)
    assert ray == ["ray", "start", "--address=head-svc:6379", "--block", '--resources={"disk": 1}']
    assert end(process) == 0


def test_the_container_ends_as_ray_does(entry):
    """What runs containers is to start it again."""
    process = entry.start("node", "head.internal:6379", RAY_ENDS="3")
    process.communicate(timeout=30)
    assert process.returncode == 3


def test_a_node_without_a_head_is_refused(entry):
    """It says what is missing."""
    process = entry.start("node")
    assert "HEAD:PORT is missing" in process.communicate(timeout=30)[1]
    assert process.returncode != 0


def test_any_other_command_is_run_as_it_is(entry):
    """For a look around in the image."""
    process = entry.start("sh", "-c", "echo here")
    assert process.communicate(timeout=30)[0] == "here\n"
    assert process.returncode == 0
