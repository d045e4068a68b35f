"""The configurations that are to be copied: each is what its own tool takes."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

CONFIGS = Path(__file__).parents[2] / "configs"
UNITS = sorted((CONFIGS / "systemd").glob("*.service"))


def test_the_systemd_units_are_whole(tmp_path):
    """systemd-analyze finds nothing to say of them, with their programs where they are to be."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in UNITS:
        text = unit.read_text()
        assert "password" not in text
        for name in ("ray", "lazyfarm"):
            text = text.replace(f"/opt/lazyfarm/bin/{name} ", f"{program} ")
        (tmp_path / unit.name).write_text(text)
    checked = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(tmp_path / unit.name for unit in UNITS)],
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert len(UNITS) == 4
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_the_ray_cluster_is_one_that_ray_takes():
    """By Ray's own schema, and its check of what is missing."""
    from ray.autoscaler._private.util import prepare_config, validate_config  # noqa: PLC0415 - two seconds

    config = yaml.safe_load((CONFIGS / "ray-cluster.yaml").read_text())
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="setup_command"):
        validate_config(prepare_config({**config, "setup_command": "x"}))


class NodeProgram:
    """lazyfarm-node with a Ray and a farm that are made up, and write down what they are told."""

    def __init__(self, directory, drained):
        self._log = directory / "log"
        self._log.touch()
        tell = f'echo "$(basename "$0") $*" >>{self._log}\n'
        ray = f'trap "echo ray ended >>{self._log}; exit 1" TERM\n{tell}while :; do sleep 0.02; done\n'
        for name, body in (("ray", ray), ("lazyfarm", f"{tell}exit {drained}\n")):
            (directory / name).write_text(f"#!/bin/bash\n{body}")
            (directory / name).chmod(0o755)
        self._path = f"{directory}:{os.environ['PATH']}"
        self._process = None

    def start(self, *args, **env):
        program = CONFIGS / "image" / "lazyfarm-node"
        self._process = subprocess.Popen(
            [program, *args], env={"PATH": self._path, "LAZYFARM_CONFIG": "farm.toml", **env}, start_new_session=True
        )

    def wait_for(self, lines):
        give_up_s = time.monotonic() + 30
        while self.told() != lines or not self._hears():
            assert time.monotonic() < give_up_s, self.told()
            time.sleep(0.01)

    def _hears(self):
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        caught = int(re.search(r"(?m)^SigCgt:\s+(\w+)", status)[1], 16)
        return bool(caught & 1 << signal.SIGTERM - 1)

    def told(self):
        return sorted(self._log.read_text().splitlines())

    def stop(self):
        """Send SIGTERM as a container's runtime does, to the first process; return what came after, in order."""
        before = len(self._log.read_text().splitlines())
        self._process.terminate()
        assert self._process.wait(30) == 0
        return self._log.read_text().splitlines()[before:]

    def end(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


NODE = "ray start --block --disable-usage-stats --address=head:6379"
NAMED = f"{NODE} --labels=lazyfarm-node=n1"


@pytest.mark.parametrize("drained", [0, 1], ids=["drained", "not-drained"])
def test_a_node_drains_before_ray_ends(tmp_path, drained):
    """It took work again when it came, and nothing does so afterwards; what is left in the end, others take over."""
    node = NodeProgram(tmp_path, drained)
    node.start("node", "head:6379", LAZYFARM_NODE="n1", LAZYFARM_DRAIN_S="300")
    try:
        node.wait_for(["lazyfarm drain n1 --undo --config farm.toml", NAMED])
        assert node.stop() == ["lazyfarm drain n1 --timeout 300 --config farm.toml", "ray ended"]
    finally:
        node.end()


@pytest.mark.parametrize(
    ("env", "command"),
    [({"LAZYFARM_DRAIN_S": "300"}, NODE), ({"LAZYFARM_NODE": "n1"}, NAMED)],
    ids=["no-name", "no-time"],
)
def test_a_node_without_a_name_or_time_does_not_drain(tmp_path, env, command):
    """Nobody could say which node it is, or nobody wants to wait."""
    node = NodeProgram(tmp_path, 0)
    node.start("node", "head:6379", **env)
    try:
        node.wait_for([command])
        assert node.stop() == ["ray ended"]
    finally:
        node.end()


def test_the_head_brings_the_farm_up_and_does_not_drain(tmp_path):
    """With it goes the cluster: there is nobody to take over."""
    head = NodeProgram(tmp_path, 0)
    head.start("head", LAZYFARM_NODE="n1", LAZYFARM_DRAIN_S="300")
    ray = "ray start --head --port=6379 --block --disable-usage-stats --labels=lazyfarm-node=n1"
    try:
        head.wait_for(["lazyfarm up --config farm.toml", ray])
        assert head.stop() == ["ray ended"]
    finally:
        head.end()
