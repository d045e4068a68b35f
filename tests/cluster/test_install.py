"""Installed as people do: a wheel in an environment of its own, used, upgraded under a running farm, taken away."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lazyfarm import __version__ as VERSION  # noqa: N812 - as it is called elsewhere
from storage.services.process import FARM_MARK, marked_pids
from tests.doubles.collector import collecting
from tests.doubles.farm import FAST
from tests.doubles.registry import Registry, random_image
from tests.doubles.registry_faults import Hang, blobs, registry_fault_proxy
from tests.doubles.wheels import (
    PREVIOUS_VERSION,
    build_previous_wheel,
    build_wheel,
    install,
    install_tool,
    python,
    uninstall_tool,
    uv,
)

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.timeout(500)]

#: Seconds that a farm may take to come to what is waited for.
SOON_S = 90.0


@dataclass
class Installed:
    """An environment that has lazyfarm, and a farm that is brought up from it."""

    venv: Path
    state_dir: Path
    #: Beside the process's own, and what makes a farm quick.
    environ: dict[str, str] = field(default_factory=dict)

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

    @contextmanager
    def driver(self):
        """Start a driver that does what it is told; it leaves at the end."""
        with subprocess.Popen(
            [self.venv / "bin" / "python", "-c", _DRIVER],
            cwd=self.venv.parent,
            env=self._environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            driver = Driver(process)
            try:
                yield driver
                process.stdin.close()
                assert process.wait(timeout=60) == 0
            finally:
                process.kill()

    def actors(self):
        """Return the process of each actor, by name, as they say themselves."""
        told = json.loads(self.run("status", "--json").stdout)
        return {actor["name"]: actor["pid"] for actor in told["actors"] if actor["state"] == "ready"}

    def releases(self):
        """Return the releases that actors serve."""
        return {name.partition("@")[2] for name in self.actors()}

    def _environment(self):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("VIRTUAL_ENV", "PYTHON"))}
        return {**kept, **FAST, **self.environ, "LAZYFARM_STATE_DIR": str(self.state_dir)}


@dataclass
class Driver:
    """A driver script that goes on; the release that it was started with is the one that it is of."""

    process: subprocess.Popen

    def say(self, *words):
        """Tell it to do something."""
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()

    def hear(self):
        """Return its next answer."""
        return self.process.stdout.readline().strip()

    def ask(self, *words):
        """Have something done; return what came of it."""
        self.say(*words)
        return self.hear()


_DRIVER = """
import sys
from lazyfarm.blocking import Farm
from lazyfarm.graph import image

def graph(name):
    return image(name, plain_http=True).mkfile("/made", name)

with Farm.connect(credentials={}) as farm:
    print("here", flush=True)
    for line in sys.stdin:
        match line.split():
            case "pull", name:
                told = farm.pull(name, plain_http=True).id
            case "extract", name:
                told = farm.pull(name, plain_http=True).extract().path
            case "submit", name:
                told = farm.submit(graph(name)).id
            case "solve", name:
                told = farm.solve(graph(name)).ref.id
        print(told, flush=True)
"""


@pytest.fixture
def place():
    """An environment that nothing is installed in, and a farm's directory; nothing runs in the end."""
    # Short, for the sake of Unix sockets.
    root = Path(tempfile.mkdtemp(prefix="lf-inst-"))
    made = Installed(root / "venv", root / "farm")
    uv("venv", "-q", "--python", python(), made.venv)
    yield made
    if made.state_dir.exists():
        made.run("down", "--purge")
    shutil.rmtree(root, ignore_errors=True)


@dataclass
class Images:
    """Images that nobody has seen, in a registry that is reached at *host*, too."""

    registry: Registry
    host: str
    #: Their layers' digests, and the image that has each.
    layers: dict[str, str] = field(default_factory=dict)

    def new(self, host=""):
        """Push one; return its name."""
        repository, image = f"installed/{secrets.token_hex(4)}", random_image(secrets.randbits(64), layers=2)
        self.registry.push(repository, "1", image)
        name = f"{host or self.host}/{repository}:1"
        self.layers |= {layer.digest: name for layer in image.layers}
        return name

    def is_layer(self, seen):
        """Match GETs of layers; their configurations are blobs, too."""
        return blobs(seen) and seen.digest in self.layers


def until(found):
    """Wait until something is so; return it."""
    give_up_s = time.monotonic() + SOON_S
    while not (so := found()):
        assert time.monotonic() < give_up_s
        time.sleep(0.2)
    return so


@contextmanager
def stopped(pid):
    """Have a process stand still."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


_HAS = "import importlib.util as u; print(*(n for n in ('ray', 'redis', 'boto3', 'opentelemetry') if u.find_spec(n)))"


def test_the_base_is_for_drivers_outside_and_says_what_a_farm_needs(place):
    """One line where something is missing, with the extra that has it, and no state directory; as a tool, too."""
    wheel = build_wheel(place.venv.parent)
    install(place.venv, wheel, extras="")
    assert has(place) == []
    (packages,) = place.venv.glob("lib/python*/site-packages")
    assert all((packages / name / "py.typed").exists() for name in ("lazyfarm", "actors", "storage", "cluster"))
    for command in (("up",), ("down",)):
        done = place.run(*command)
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert "needs ray, which is not installed (hint: pip install 'lazyfarm[farm]'" in done.stderr
    assert "pip install 'lazyfarm[farm]' on machines of the farm" in place.run("doctor").stdout
    token = place.venv.parent / "token"
    token.write_text("guessed")
    place.environ |= {"LAZYFARM_URL": "https://127.0.0.1:1", "LAZYFARM_TOKEN_FILE": str(token)}
    done = place.run("pull", "debian:12")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "the gateway at https://127.0.0.1:1 is unavailable" in done.stderr

    install(place.venv, wheel, extras="otel")
    assert has(place) == ["opentelemetry"]
    tool = install_tool(place.venv.parent, wheel)
    assert subprocess.check_output([tool, "--version"], text=True) == f"lazyfarm {VERSION}\n"
    uninstall_tool(place.venv.parent)
    assert not tool.exists()
    assert not place.state_dir.exists()


def has(place):
    """Return which of the extras' packages are installed."""
    return subprocess.check_output([place.venv / "bin" / "python", "-c", _HAS], text=True).split()


def test_a_farm_is_upgraded_while_it_works_back_again_and_taken_away(place, registry):
    """From the code of an earlier time. Refs, leases, pins and jobs are kept; both releases work side by side."""
    with collecting() as collector, registry_fault_proxy(registry.url) as proxy:
        _upgraded(place, registry, proxy, collector)


def _upgraded(farm, registry, proxy, collector):
    previous = build_previous_wheel(farm.venv.parent)
    this = build_wheel(farm.venv.parent)
    install(farm.venv, previous, extras="")
    assert farm.run("--version").stdout == f"lazyfarm {PREVIOUS_VERSION}\n"
    up = farm.json("up", "--nodes", "1")
    assert farm.releases() == {PREVIOUS_VERSION}
    images = Images(registry, proxy.host)
    lazy, present = images.new(registry.host), images.new(registry.host)
    lazy_ref = farm.json("pull", lazy)["ref"]
    present_ref = farm.json("pull", present)["ref"]
    extracted = farm.json("extract", present_ref)["nodes"][0]["path"]
    pinned = farm.json("leases", "pin", lazy_ref)["id"]

    attached, detached, shared, theirs, ours = (images.new() for _ in range(5))
    with farm.driver() as builder, farm.driver() as driver:
        assert builder.hear() == driver.hear() == "here"
        assert driver.ask("pull", lazy) == lazy_ref
        # That release reads scripts of Redis when it first needs them: a build has it read them while they are its own.
        assert driver.ask("solve", present).startswith("sha256:")
        hold = Hang()
        proxy.script(hold, of=images.is_layer, times=None)
        job = driver.ask("submit", detached)
        builder.say("solve", attached)
        until(lambda: {images.layers.get(seen.digest) for seen in proxy.blob_gets()} >= {attached, detached})

        # Both jobs wait for their layers, as the code on disk becomes another's.
        install(farm.venv, this, extras="farm,otel")
        assert farm.run("--version").stdout == f"lazyfarm {VERSION}\n"
        # What dies meanwhile comes back with that code, and serves those that it served.
        before = farm.actors()
        for name in (f"supervisor@{PREVIOUS_VERSION}", f"cache-shard-0@{PREVIOUS_VERSION}"):
            os.kill(before[name], signal.SIGKILL)
            until(lambda name=name: farm.actors().get(name, before[name]) != before[name])
        assert farm.releases() == {PREVIOUS_VERSION}

        farm.environ["LAZYFARM__TRACING__ENDPOINT"] = collector.url
        again = farm.json("up")
        assert again["redis"] == up["redis"]
        assert farm.releases() == {PREVIOUS_VERSION, VERSION}
        assert "problems" not in farm.json("status")
        assert "already up" in farm.run("up").stdout

        proxy.unscript()
        hold.proceed.set()
        assert builder.hear()
        until(lambda: farm.json("jobs", "show", job)["state"] == "done")

        # One flight, an owner of the old release, a waiter of the new one.
        hold = Hang()
        proxy.script(hold, of=images.is_layer, times=None)
        shared_ref = farm.json("pull", "--plain-http", shared)["ref"]
        driver.say("extract", shared)
        assert hold.arrived.wait(SOON_S)
        with farm.driver() as newer:
            assert newer.hear() == "here"
            newer.say("extract", shared)
            until(lambda: any(layer["waiters"] for layer in farm.json("explain", "wait", shared_ref)["layers"]))
            proxy.unscript()
            hold.proceed.set()
            path = driver.hear()
            assert Path(path, "data-0").exists()
            assert newer.hear() == path
            gets = Counter(seen.digest for seen in proxy.blob_gets() if images.layers.get(seen.digest) == shared)
            assert list(gets.values()) == [1, 1]

            # An old driver's job at the new scheduler, and a new driver's, with its trace, at the old one.
            schedulers = {v: farm.actors()[f"solver-scheduler-0@{v}"] for v in (PREVIOUS_VERSION, VERSION)}
            with stopped(schedulers[PREVIOUS_VERSION]):
                assert driver.ask("solve", theirs).startswith("sha256:")
            with stopped(schedulers[VERSION]):
                assert newer.ask("solve", ours).startswith("sha256:")

    # Of the new driver's job, too, whose scheduler knows of no traces. The old driver's has none to go on with.
    collector.wait(lambda spans: {"solve", "submit", "FetchWorker/extract"} <= {span.name for span in spans})
    kept(farm, lazy_ref, present_ref, pinned, extracted)
    ended = farm.json("up", "--retire")["stopped"]
    assert {name.partition("@")[2] for name in ended} == {PREVIOUS_VERSION}
    assert farm.releases() == {VERSION}
    assert farm.json("up")["changed"] is False

    # And back: without the settings that the older one doesn't know.
    farm.environ.clear()
    plain = farm.venv.parent / "plain.toml"
    plain.touch()
    farm.json("up", "--config", str(plain))
    install(farm.venv, previous, "--no-deps", extras="")
    farm.json("up")
    assert farm.releases() == {PREVIOUS_VERSION, VERSION}
    kept(farm, lazy_ref, present_ref, pinned, extracted)
    with farm.driver() as older:
        assert older.hear() == "here"
        assert older.ask("solve", ours).startswith("sha256:")

    # What comes back meanwhile under the newer name has the older code, as on a node that was not upgraded yet.
    shard = f"cache-shard-0@{VERSION}"
    before = farm.actors()[shard]
    os.kill(before, signal.SIGKILL)
    until(lambda: farm.actors().get(shard, before) != before)
    install(farm.venv, this, "--no-deps")
    assert farm.json("up")["stopped"] == [shard]
    assert farm.releases() == {PREVIOUS_VERSION, VERSION}

    mark = (farm.state_dir / "farm-id").read_text().strip()
    assert marked_pids({FARM_MARK: mark})
    farm.json("down", "--purge")
    assert not marked_pids({FARM_MARK: mark})
    assert not farm.state_dir.exists()
    assert str(farm.venv.parent) not in Path("/proc/mounts").read_text()


def kept(farm, lazy_ref, present_ref, pinned, extracted):
    """See that the farm has what it had: a lazy ref, a present one, its snapshot, and a pin."""
    refs = {ref["ref"]: ref["lazy"] for ref in farm.json("refs", "ls")["refs"]}
    assert (refs[lazy_ref], refs[present_ref]) == (True, False)
    assert pinned in {lease["id"] for lease in farm.json("leases", "ls")["leases"]}
    layers = farm.json("unlazy", present_ref)["layers"]
    assert {layer["source"] for layer in layers} == {"present"}
    assert farm.json("extract", present_ref)["nodes"][0]["path"] == extracted
