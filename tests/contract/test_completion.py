"""A tab in each shell: what is offered of commands, options, and of a farm in Redis; nothing where there is none."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.config import RedisConfig
from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.graph import encode_definition
from cluster.job import JobId, JobSpec
from cluster.lease import LeaseId
from cluster.messages import NodeRecord, SessionInfo
from cluster.ref import ImageRecord
from lazyfarm.graph import image
from storage.jobs import RedisJobStore
from storage.presence import Presence
from tests.doubles.redis import redis_binaries
from tests.doubles.stores import FarmOfRedis

pytestmark = pytest.mark.redis

GRAPH = image("debian:12").run("make")
#: Long enough for a shell on a machine that has much else to do.
_PATIENCE_S = 60.0
#: How each shell is had without its user's own settings, and told how to complete.
_SHELLS = {
    "bash": (["bash", "--noprofile", "--norc", "-i"], "bind 'set bell-style none'; source {script}"),
    "zsh": (["zsh", "-f", "-i"], "autoload -Uz compinit; compinit -u -d {script}.dump; unsetopt beep; source {script}"),
}


@pytest.fixture(scope="module")
def lazyfarm(tmp_path_factory):
    """A directory of PATH with the command."""
    place = tmp_path_factory.mktemp("bin")
    script = place / "lazyfarm"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m lazyfarm "$@"\n')
    script.chmod(0o755)
    return place


@pytest.fixture
async def environ(redis_servers, tmp_path, lazyfarm):
    """The environment of somebody whose farm has two jobs, a lease and two nodes."""
    farm = FarmOfRedis(redis_servers(next(iter(redis_binaries()))).config, tmp_path / "state")
    stores = farm.stores()
    lease = LeaseId("pin-nightly")
    await stores.leases.create(lease, ttl_s=600.0)
    blob = Descriptor(media_type="x", digest=digest_of(b"x"), size_bytes=1)
    for name in ("docker.io/library/debian:12", "localhost:5000/app:1", "localhost:5000/app:2"):
        made = ImageRecord(name=name, manifest=blob, config=blob, platform="linux/amd64", layers=(), ref=None)
        await stores.refs.put_image(made, lease_id=lease)
    await Presence(farm.links[0], farm.keys).announce_nodes(
        [NodeRecord(id=name, ray_id=name, address="", alive=True) for name in ("n0", "worker-1")]
    )
    definition = encode_definition(GRAPH.definition())
    jobs = RedisJobStore(farm.links[0], farm.keys)
    for job in ("4f2a", "77aa"):
        await jobs.submit(
            JobSpec(
                id=JobId(job),
                definition=digest_of(definition),
                targets=GRAPH.definition().targets,
                session=SessionInfo(session_id="driver-1"),
            ),
            definition,
        )
    yield _environ(lazyfarm, farm.state_dir)
    await farm.close()


def _environ(place, state_dir):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LAZYFARM", "BASH_"))}
    path = os.pathsep.join([str(place), kept["PATH"]])
    return {**kept, "PATH": path, "TERM": "dumb", "PS1": "", "LAZYFARM_STATE_DIR": str(state_dir)}


def _script(shell, environ, place):
    """Write what `lazyfarm --show-completion` prints in that shell."""
    done = subprocess.run(
        ["lazyfarm"],
        env={**environ, "_LAZYFARM_COMPLETE": f"source_{shell}"},
        capture_output=True,
        text=True,
        check=False,
    )
    (script := Path(place, f"completion.{shell}")).write_text(done.stdout)
    return script


class Shell:
    """A shell at a terminal, in which somebody types."""

    def __init__(self, name, environ, place):
        command, setup = _SHELLS[name]
        self._ours, theirs = pty.openpty()
        self._process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=environ, cwd=place, start_new_session=True
        )
        os.close(theirs)
        self._type(setup.format(script=_script(name, environ, place)) + "; echo rea''dy\n")
        self._until("ready\r")

    def words(self, typed):
        """Return the words that stand there when *typed*, tabs among it, is done with."""
        # Home; what is there become arguments of another command.
        self._type(f"{typed}\x01printf '<%s>' \n")
        told = self._until("<lazyfarm>[^\r\n]*")
        return re.findall("<(.*?)>", told)[1:]

    def close(self):
        self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def _type(self, text):
        os.write(self._ours, text.encode())

    def _until(self, wanted):
        said, give_up_s = "", time.monotonic() + _PATIENCE_S
        while not (found := re.search(wanted + "(?=[\r\n])|" + wanted + "$", said)):
            assert time.monotonic() < give_up_s, said
            if select.select([self._ours], [], [], 1.0)[0]:
                said += os.read(self._ours, 65536).decode(errors="replace")
        return found[0]


def _complete(shell, environ, place, lines):
    """Return the words that *lines*, in which tabs are, come to."""
    if shell == "fish":
        return _in_fish(environ, place, lines)
    there = Shell(shell, environ, place)
    try:
        return {line: there.words(line) for line in lines}
    finally:
        there.close()


def _in_fish(environ, place, lines):
    """Ask fish what it offers for each line, of which it takes one that is alone."""
    asking = [f"source {_script('fish', environ, place)}"]
    asking += [f'complete -C "{line.rstrip()}"; echo ====' for line in lines]
    done = subprocess.run(
        ["fish", "--no-config", "-c", "\n".join(asking)],
        env=environ,
        cwd=place,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    told = {}
    for line, block in zip(lines, done.stdout.split("====\n"), strict=False):
        before, _, word = line.rstrip().rpartition(" ")
        offered = [one.partition("\t")[0] for one in block.splitlines()]
        told[line] = [*before.split()[1:], offered[0] if len(offered) == 1 else word]
    return told


_OFFERED = {
    "lazyfarm rep\t": ["report"],
    "lazyfarm build --det\t": ["build", "--detach"],
    "lazyfarm jobs sh\t": ["jobs", "show"],
    "lazyfarm jobs show 4\t": ["jobs", "show", "4f2a"],
    "lazyfarm leases show pin\t": ["leases", "show", "pin-nightly"],
    "lazyfarm drain wor\t": ["drain", "worker-1"],
    "lazyfarm config explain cache.kee\t": ["config", "explain", "cache.keep_s"],
    "lazyfarm unlazy doc\t": ["unlazy", "docker.io/library/debian:12"],
    "lazyfarm attach --progress pl\t": ["attach", "--progress", "plain"],
    "lazyfarm audit --operation take\t": ["audit", "--operation", "take-over"],
}
#: What bash alone breaks into several words, and has a tab for the last one of them.
_IN_PIECES = {
    "lazyfarm attach --progress=pl\t": ["attach", "--progress=plain"],
    "lazyfarm push localhost:\t2": ["push", "localhost:5000/app:2"],
    "lazyfarm unlazy docker.io/library/debian:1\t": ["unlazy", "docker.io/library/debian:12"],
}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_tab_completes(shell, environ, tmp_path):
    """Commands, options, and what the farm has: its jobs, leases and nodes."""
    assert shutil.which(shell), f"{shell} is not installed"
    place = tmp_path / "empty"
    place.mkdir()
    wanted = _OFFERED | (_IN_PIECES if shell == "bash" else {})
    assert _complete(shell, environ, place, wanted) == wanted


@pytest.mark.parametrize("trouble", ["none", "broken", "silent", "gateway"])
def test_who_has_no_farm_that_answers_is_offered_nothing(trouble, lazyfarm, tmp_path):
    """Nothing is told either, and nobody waits: not for a Redis that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        state = tmp_path / "state"
        if trouble == "silent":
            FarmOfRedis(RedisConfig(url=f"redis://127.0.0.1:{server.getsockname()[1]}/0"), state)
        elif trouble == "broken":
            state.mkdir()
            (state / "farm.toml").write_text("[farm\n")
        environ = _environ(lazyfarm, state)
        if trouble == "gateway":
            environ |= {"LAZYFARM_URL": "https://farm.example:1"}
        asked = {"_LAZYFARM_COMPLETE": "complete_bash", "COMP_WORDS": "lazyfarm\njobs\nshow\n", "COMP_CWORD": "3"}
        began_s = time.monotonic()
        done = subprocess.run(["lazyfarm"], env={**environ, **asked}, capture_output=True, text=True, check=True)
        assert (done.stdout.strip(), done.stderr) == ("", "")
        assert time.monotonic() - began_s < _PATIENCE_S / 2
