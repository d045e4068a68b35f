"""A farm's life: up, up again, repair after kill -9 of each process, down, purge, and neighbours."""

import contextlib
import json
import os
import re
import secrets
import signal
import ssl
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from lazyfarm.settings import load_settings
from storage.services.process import FARM_MARK, SERVICE_MARK
from tests.doubles.farm import FAST, RunningFarm
from tests.doubles.redis import free_port, redis_binaries, redis_server
from tests.doubles.registry import make_authority, random_image

pytestmark = [pytest.mark.cluster, pytest.mark.registry, pytest.mark.timeout(300)]

SOON_S = 30.0


def processes(farm):
    """Return every process that carries the farm's mark: pid to (service, command's name)."""
    mark = f"{FARM_MARK}={Path(farm.state_dir, 'farm-id').read_text().strip()}"
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        with contextlib.suppress(OSError):  # it has ended
            environment = (entry / "environ").read_text(errors="replace").split("\0")
            if mark in environment:
                service = next((x for x in environment if x.startswith(f"{SERVICE_MARK}=")), "").partition("=")[2]
                found[int(entry.name)] = (service, (entry / "comm").read_text().strip())
    return found


def mounts(farm):
    return [line for line in Path("/proc/mounts").read_text().splitlines() if f" {farm.state_dir}/" in line]


def works(farm, registry):
    """Pull an image nobody has seen and extract it; the files are there."""
    repository = f"life/{secrets.token_hex(4)}"
    registry.push(repository, "1", random_image(secrets.randbits(64), layers=2))
    pulled = farm.cli_json("pull", f"{registry.host}/{repository}:1")
    assert [layer["lazy"] for layer in pulled["layers"]] == [True, True]
    (node,) = farm.cli_json("extract", pulled["ref"])["nodes"]
    assert Path(node["path"], "data-1").stat().st_size == 20_000
    return pulled["ref"]


def lazy_ref(farm, registry):
    """Pull an image and leave it lazy."""
    repository = f"life/{secrets.token_hex(4)}"
    registry.push(repository, "1", random_image(secrets.randbits(64), layers=2))
    return farm.cli_json("pull", f"{registry.host}/{repository}:1")["ref"]


@pytest.fixture(scope="module")
def lazy(farm, registry_server):
    """A ref that stays lazy whatever happens to the farm."""
    return lazy_ref(farm, registry_server)


def refs(farm):
    """Return each ref with whether it is lazy."""
    return {ref["ref"]: ref["lazy"] for ref in farm.cli_json("refs", "ls")["refs"]}


@contextlib.contextmanager
def neighbour(directory, config="", *, environ=FAST):
    """Bring up another farm of one node, by the command line; it is purged at the end of the block."""
    file = directory.with_suffix(".toml")
    file.write_text(config)
    farm = RunningFarm(state_dir=directory, settings=None, environ=dict(environ))
    try:
        farm.told = farm.cli_json("up", "--nodes", "1", "--config", str(file), timeout_s=240)
        yield farm
    finally:
        farm.cli("down", "--purge", check=False)


# -- up again ------------------------------------------------------------------------------------------------


def test_up_again_is_a_no_op_that_says_so(farm):
    """To people and to scripts; every process stays the one it was."""
    before = set(processes(farm))
    told = farm.cli_json("up")
    assert (told["changed"], told["started"], told["stopped"]) == (False, [], [])
    assert {actor["node"] for actor in told["actors"] if actor["kind"] == "supervisor"} == {"n0"}
    assert {node["id"] for node in told["nodes"]} == {"n0", "n1", "n2"}
    assert "already up: nothing was changed" in farm.cli("up").stdout
    assert before <= set(processes(farm))


# -- kill -9 -------------------------------------------------------------------------------------------------


def by_name(services, name=""):
    """Find, for each of *services*, its first process whose command's name starts so."""

    def find(farm):
        running = sorted(processes(farm).items())
        return [
            next(pid for pid, (s, n) in running if s == service and n.startswith(name)) for service in services.split()
        ]

    return find


def actor(kind):
    """Find the process of the last actor of a kind."""

    def find(farm):
        return [a["pid"] for a in farm.cli_json("status")["actors"] if a["kind"] == kind][-1:]

    return find


@pytest.mark.parametrize(
    "victims",
    [
        pytest.param(by_name("redis", "redis-server"), id="redis"),
        pytest.param(by_name("s3-proxy"), id="s3-proxy"),
        # One `up` for three: each is a service of its own, started by itself.
        pytest.param(by_name("s3-account s3-container s3-object"), id="s3 storage"),
        pytest.param(actor("fetch-worker"), id="fetch-worker"),
        pytest.param(actor("cache-shard"), id="cache-shard"),
        # Two kinds, one `up`: each is restarted by itself.
        pytest.param(lambda farm: [*actor("op-worker")(farm), *actor("solver-scheduler")(farm)], id="builders"),
        pytest.param(actor("supervisor"), id="supervisor"),
        pytest.param(by_name("ray-n2", "raylet"), id="raylet"),
        pytest.param(by_name("ray-n1", "python"), id="ray start"),
        pytest.param(by_name("ray-n0", "gcs_server"), id="gcs"),
        pytest.param(by_name("ray-dashboard", "python"), id="ray dashboard"),
    ],
)
def test_up_repairs_what_kill_9_ended(farm, registry, lazy, victims):
    """Whichever process it was: all runs again, refs are there, lazy ones are lazy, and new work is done."""
    pids = victims(farm)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    until_gone(pids)
    farm.cli("up", timeout_s=200)
    assert not set(pids) & set(processes(farm))
    status = farm.cli_json("status")
    assert "problems" not in status
    assert {(a["kind"], a["state"]) for a in status["actors"]} == {
        (kind, "ready") for kind in ("supervisor", "cache-shard", "fetch-worker", "op-worker", "solver-scheduler")
    }
    assert refs(farm)[lazy] is True
    works(farm, registry)


def until_gone(pids):
    give_up_s = time.monotonic() + SOON_S
    while any(Path(f"/proc/{pid}").exists() and not _is_zombie(pid) for pid in pids):
        assert time.monotonic() < give_up_s, f"{pids} still run"
        time.sleep(0.05)


def _is_zombie(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


# -- the gateway ---------------------------------------------------------------------------------------------


@pytest.fixture
def outside(farm, tmp_path):
    """The farm has a gateway that speaks TLS; returns the command line of a driver that knows nothing else of it."""
    authority, port = make_authority(tmp_path), free_port()
    asked = {"ENABLED": "true", "PORT": str(port), "CERT_FILE": authority.certificate, "KEY_FILE": authority.key}
    overrides = {f"LAZYFARM__GATEWAY__{name}": str(value) for name, value in asked.items()}
    farm.environ.update(overrides)
    told = farm.cli_json("up")
    # The actors go on as they are: none of them reads where the gateway listens.
    assert (told["started"], told["stopped"]) == (["gateway"], [])
    driver = {
        **{name: value for name, value in os.environ.items() if not name.startswith("LAZYFARM_")},
        "LAZYFARM_URL": told["gateway"],
        "LAZYFARM_TOKEN_FILE": str(farm.state_dir / "secrets" / "gateway-token"),
        "LAZYFARM_CA_FILE": str(authority.ca_file),
        "HOME": str(tmp_path),
    }

    def run(*arguments):
        command = [sys.executable, "-m", "lazyfarm", *arguments]
        return subprocess.run(command, env=driver, capture_output=True, text=True, timeout=120, check=True).stdout

    run.url, run.trust = told["gateway"], ssl.create_default_context(cafile=authority.ca_file)
    yield run
    for name in overrides:
        del farm.environ[name]
    farm.environ["LAZYFARM__GATEWAY__ENABLED"] = "false"
    told = farm.cli_json("up")
    del farm.environ["LAZYFARM__GATEWAY__ENABLED"]
    assert (told["started"], told["stopped"], told["gateway"]) == ([], ["gateway"], None)


def doctor_on_the_gateway(farm, about="gateway"):
    found = json.loads(farm.cli("doctor", "--json", check=False).stdout)["findings"]
    return next(finding for finding in found if finding["check"] == about)


def test_the_gateway_is_a_part_of_the_farm(farm, registry, outside):
    """Who comes from outside pulls and finds the page; a gateway that was killed is missed, and `up` repairs it."""
    registry.push("life/outside", "1", random_image(secrets.randbits(64), layers=2))
    name = f"{registry.host}/life/outside:1"
    ref = json.loads(outside("pull", name, "--json"))["ref"]
    assert refs(farm)[ref] is True
    link = outside("page").strip()
    assert link.startswith(f"{outside.url}/?token=")
    opened = urllib.request.build_opener(
        urllib.request.HTTPSHandler(context=outside.trust), urllib.request.HTTPCookieProcessor()
    ).open(link, timeout=30)
    with opened:
        assert (opened.status, opened.url, b"fetch-worker" in opened.read()) == (200, f"{outside.url}/", True)
    assert (farm.cli_json("status")["gateway"], doctor_on_the_gateway(farm)["ok"]) == (outside.url, "ok")
    certificate = doctor_on_the_gateway(farm, "gateway certificate")
    assert (certificate["ok"], re.search(r"ends in 2[34] h", certificate["detail"]) is not None) == ("warn", True)
    assert farm.cli_json("up")["changed"] is False

    (pid,) = by_name("gateway")(farm)
    os.kill(pid, signal.SIGKILL)
    until_gone([pid])
    status = farm.cli("status", check=False)
    assert status.returncode == 1
    assert re.search(r"gateway at 127\.0\.0\.1:\d+ accepts no connection \(hint: `lazyfarm up` repairs", status.stderr)
    missed = doctor_on_the_gateway(farm)
    assert (missed["ok"], missed["advice"].partition(";")[0]) == ("fail", "lazyfarm up")
    told = farm.cli_json("up")
    assert (told["started"], told["gateway"]) == (["gateway"], outside.url)
    assert json.loads(outside("pull", name, "--json"))["ref"] == ref
    log = (farm.state_dir / "logs" / "gateway.log").read_text()
    assert (farm.state_dir / "secrets" / "gateway-token").read_text().strip() not in log


# -- down ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("outside")
def test_down_ends_all_of_the_farm_and_nothing_else_and_up_finds_its_data(farm, registry):
    """No process, no mount is left; refs survive, lazy ones as lazy ones, and what was present is not fetched anew."""
    still_lazy, present = lazy_ref(farm, registry), works(farm, registry)
    known = refs(farm)
    with subprocess.Popen(["sleep", "600"], env={**os.environ, "LAZYFARM_STATE_DIR": str(farm.state_dir)}) as bystander:
        before = set(processes(farm))
        assert before
        assert mounts(farm) or os.geteuid() != 0
        told = farm.cli_json("down")
        assert set(told) == {"stopped"}
        ours = {"redis", "s3-proxy", "ray-n0", "ray-n1", "ray-n2", "ray-dashboard", "page", "gateway"}
        assert ours <= set(told["stopped"])
        until_gone(before)
        assert processes(farm) == {}
        assert mounts(farm) == []
        assert bystander.poll() is None
        bystander.kill()
    assert farm.cli_json("down") == {"stopped": []}
    assert json.loads(farm.cli("status", "--json", check=False).stdout)["error"]["type"] == "FarmNotRunningError"

    up = farm.cli_json("up", "--nodes", "3", timeout_s=240)
    assert up["changed"] is True
    assert refs(farm) == known
    assert (known[still_lazy], known[present]) == (True, False)
    assert {layer["source"] for layer in farm.cli_json("unlazy", present)["layers"]} == {"present"}
    assert {layer["source"] for layer in farm.cli_json("unlazy", still_lazy)["layers"]} != {"present"}
    (node,) = farm.cli_json("extract", present)["nodes"]
    assert Path(node["path"], "data-0").exists()


# -- changes -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A farm of one node with a configuration file: for tests that change either."""
    with neighbour(tmp_path_factory.mktemp("own") / "farm") as farm:
        yield farm


def actors(told):
    return {actor["name"]: actor["pid"] for actor in told["actors"]}


def is_well(farm):
    """All that is told of is there; the doctor finds nothing dead or lost."""
    assert "problems" not in farm.cli_json("status")
    findings = {f["check"]: f["ok"] for f in json.loads(farm.cli("doctor", "--json", check=False).stdout)["findings"]}
    assert (findings["nodes"], findings["actors"]) == ("ok", "ok")


def test_a_changed_configuration_is_applied_to_what_runs(own, registry):
    """Edited file or override: actors start anew with it, which is told; drivers follow; then `up` changes nothing."""
    file = own.state_dir.with_suffix(".toml")
    before = own.cli_json("status")
    file.write_text("[cache]\nshards = 3\n")
    told = own.cli_json("up", timeout_s=200)
    assert told["changed"] is True
    assert {actor["name"] for actor in before["actors"]} == set(told["stopped"])
    assert {actor["name"] for actor in told["actors"]} == set(told["started"])
    assert sum(actor["kind"] == "cache-shard" for actor in told["actors"]) == 3
    assert not set(actors(before).values()) & set(actors(told).values())
    is_well(own)
    works(own, registry)

    own.environ["LAZYFARM__FETCH__RANGES_PER_LAYER"] = "2"
    overridden = own.cli_json("up", timeout_s=200)
    del own.environ["LAZYFARM__FETCH__RANGES_PER_LAYER"]
    assert set(overridden["stopped"]) == set(actors(told))
    # The override is remembered, and the file is not needed any more.
    file.unlink()
    again = own.cli_json("up")
    assert (again["changed"], actors(again)) == (False, actors(overridden))
    assert load_settings(own.state_dir, None, {}).config.fetch.ranges_per_layer == 2
    assert load_settings(own.state_dir, None, {}).config.cache.shards == 3
    works(own, registry)


def test_nodes_that_are_taken_down_on_purpose_are_told_of_once(own, registry):
    """As stopped, by the `up` that takes them down; from then on nobody misses them, and work goes on."""
    grown = own.cli_json("up", "--nodes", "2", timeout_s=200)
    assert ("ray-n1" in grown["started"], grown["stopped"]) == (True, [])
    works(own, registry)

    shrunk = own.cli_json("up", "--nodes", "1", timeout_s=200)
    assert (shrunk["changed"], shrunk["stopped"]) == (True, ["ray-n1"])
    assert [(node["id"], node["alive"]) for node in shrunk["nodes"]] == [("n0", True)]
    assert {(actor["node"], actor["state"]) for actor in shrunk["actors"]} == {("n0", "ready")}
    is_well(own)
    again = own.cli_json("up")
    assert (again["changed"], actors(again)) == (False, actors(shrunk))
    works(own, registry)


# -- neighbours ----------------------------------------------------------------------------------------------


def addresses(told):
    return {told["redis"], told["s3"], told["ray"]}


def test_two_farms_on_one_machine_do_not_meet(farm, registry, lazy, tmp_path):
    """Other ports, other refs; the end of one is nothing to the other; purge leaves nothing of it."""
    ours = farm.cli_json("status")
    before = set(processes(farm))
    with neighbour(tmp_path / "other") as other:
        assert not addresses(ours) & addresses(other.told)
        assert lazy not in refs(other)
        ref = works(other, registry)
        assert ref not in refs(farm)
        assert not set(processes(other)) & set(processes(farm))
        gone = set(processes(other))
        temp = (other.state_dir / "ray").readlink()
        assert other.cli_json("down", "--purge")["stopped"]
        until_gone(gone)
        assert not other.state_dir.exists()
        assert not temp.exists()
        assert mounts(other) == []
    assert before <= set(processes(farm))
    assert farm.cli_json("status")["actors"] == ours["actors"]
    works(farm, registry)


def _named(farm, service):
    """Return a configuration that names one service of *farm*, under another farm's name."""
    config = farm.cli_json("status")
    secret = farm.state_dir / "secrets"
    table = {
        "redis": f'[redis]\nurl = "{config["redis"]}"\npassword_file = "{secret}/redis-password"\n',
        "s3": f'[s3]\nendpoint = "{config["s3"]}"\ncredentials_file = "{_s3_file(farm)}"\nbucket = "borrowed"\n',
        "ray": f'[ray]\naddress = "{config["ray"]}"\ntoken_file = "{secret}/ray-token"\n',
    }
    return f'[farm]\nname = "borrower"\n\n{table[service]}'


def _s3_file(farm):
    import tomllib  # noqa: PLC0415 - the one place that looks inside

    return tomllib.loads((farm.state_dir / "farm.toml").read_text())["s3"]["credentials_file"]


@pytest.mark.parametrize("service", ["redis", "s3", "ray"])
def test_what_the_configuration_names_is_used_and_neither_started_nor_ended(farm, registry, lazy, tmp_path, service):
    """Each on its own; the rest is started. Down ends the farm's part of it alone: its actors, where Ray is named."""
    lenders = farm.cli_json("status")
    running = set(processes(farm))
    node_root = tmp_path / "disk"
    config = f'{_named(farm, service)}\n[node]\nroot = "{node_root}"\n'
    with neighbour(tmp_path / "borrower", config) as borrower:
        assert borrower.told[service] == lenders[service]
        assert not {name for name, _ in processes(borrower).values()} & {service, f"{service}-proxy", f"{service}-n0"}
        assert len(borrower.told["nodes"]) == (3 if service == "ray" else 1)
        assert "problems" not in borrower.cli_json("status")
        assert lazy not in refs(borrower)
        works(borrower, registry)
        actors = [actor["pid"] for actor in borrower.cli_json("status")["actors"]]
        (node_root / "precious").write_text("not the farm's")
        told = borrower.cli_json("down")
        assert not {name for name in told["stopped"] if name.startswith(service)}
        until_gone(actors)
        assert [line for line in Path("/proc/mounts").read_text().splitlines() if str(node_root) in line] == []
        borrower.cli("down", "--purge")
        assert [path.name for path in node_root.iterdir()] == ["precious"]
    assert running <= set(processes(farm))
    assert "problems" not in farm.cli_json("status")
    assert refs(farm)[lazy] is True


# -- refusals ------------------------------------------------------------------------------------------------


def refused(state_dir, config, tmp_path):
    """Run an ``up`` that must fail, and return its error document."""
    file = tmp_path / "farm.toml"
    file.write_text(config)
    farm = RunningFarm(state_dir=state_dir, settings=None)
    done = farm.cli("up", "--config", str(file), "--json", check=False)
    assert (done.returncode, done.stderr) == (1, "")
    return json.loads(done.stdout)["error"]


def test_every_fault_of_a_configuration_is_told_at_once(tmp_path):
    """Each with its key, without a traceback, and before anything is made."""
    config = """
[redis]
url = "http://127.0.0.1:1"
[fetch]
ranges_per_layer = 0
nonsense = true
[node]
snapshotter = "zfs"
[colour]
red = 1
"""
    error = refused(tmp_path / "state", config, tmp_path)
    assert error["type"] == "ConfigError"
    for key in ("redis.url", "fetch.ranges_per_layer", "fetch.nonsense", "node.snapshotter", "colour"):
        assert key in error["message"]
    assert not (tmp_path / "state").exists()


def test_a_redis_that_evicts_is_refused_before_anything_starts(tmp_path):
    """Records would be thrown out for want of memory: the policy is named, and what to set instead."""
    with redis_server(next(iter(redis_binaries().values())), "--maxmemory-policy", "allkeys-lru") as server:
        error = refused(tmp_path / "state", f'[redis]\nurl = "{server.config.url}"\n', tmp_path)
    assert error["type"] == "UnsafeStoreError"
    assert "allkeys-lru" in error["message"]
    assert "noeviction" in error["message"] + error["hint"]
    assert not list((tmp_path / "state").glob("run/*.json"))


def test_a_named_service_that_does_not_answer_is_named(tmp_path):
    """The address, within the deadline of its client."""
    error = refused(tmp_path / "state", '[redis]\nurl = "redis://127.0.0.1:1/0"\ntimeout_s = 2\n', tmp_path)
    assert "127.0.0.1:1" in error["message"]
