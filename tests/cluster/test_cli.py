"""The command line on a real farm of three nodes: every command as a process of its own.

What commands do with a farm that is made up, and in which words, is in ``tests/unit/test_cli.py``.
"""

import contextlib
import json
import os
import pty
import re
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.doubles.program import program_image
from tests.doubles.registry import build_image, build_index, build_layer, docker_registry, htpasswd_config, random_image

pytestmark = [pytest.mark.cluster, pytest.mark.registry]

MIB = 1024**2
SOON_S = 30.0


def fresh_image(*, layers, layer_bytes=20_000):
    """Make an image that no farm has seen."""
    return random_image(secrets.randbits(64), layers=layers, layer_bytes=layer_bytes)


def until(fact, what):
    """Wait for a fact, and return it."""
    give_up_s = time.monotonic() + SOON_S
    while not (found := fact()):
        assert time.monotonic() < give_up_s, f"{what}: not within {SOON_S:.0f} s"
        time.sleep(0.05)
    return found


def fails(farm, *arguments):
    """Run a command that must fail: exit 1, one error document on stdout, nothing else. Returns the error."""
    done = farm.cli(*arguments, "--json", check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert set(told) == {"error"}
    assert set(told["error"]) == {"type", "message", "hint"}
    return told["error"]


def layer_gets(registry, image):
    """Count GETs of the image's layers at the registry since it was told to forget."""
    digests = {layer.digest for layer in image.layers}
    return sum(r.method == "GET" and r.path.rpartition("/")[2] in digests for r in registry.requests())


def driver_leases(farm):
    """Return the IDs of the leases that drivers hold."""
    return {lease["id"] for lease in farm.cli_json("leases", "ls")["leases"] if lease["id"].startswith("driver-")}


@contextlib.contextmanager
def command(farm, *arguments, **options):
    """Run a command in the background; it is gone at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", "lazyfarm", *arguments],
        env={**os.environ, **farm.environ, "LAZYFARM_STATE_DIR": str(farm.state_dir)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )
    try:
        yield process
    finally:
        process.kill()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()
        process.wait()


# -- one image's way through the farm ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def program(registry_server):
    """An image with a shell, and its name at the registry."""
    image = program_image(f"hello from layer {secrets.token_hex(4)}")
    registry_server.push("cli/program", "1", image)
    return image, f"{registry_server.host}/cli/program:1"


@pytest.fixture(scope="module")
def pulled(farm, registry_server, program):
    """The document of its pull, and what the registry was asked for meanwhile."""
    registry_server.forget()
    told = farm.cli_json("pull", program[1])
    return told, registry_server.requests()


def test_a_pull_makes_lazy_refs_and_reads_no_layer(pulled, program):
    """Manifest and config are read; each layer is a lazy ref, the last one the image's."""
    (told, requests), (image, name) = pulled, program
    assert set(told) == {"ref", "image", "digest", "layers"}
    assert (told["image"], told["digest"]) == (name, image.digest)
    assert [layer["digest"] for layer in told["layers"]] == [layer.digest for layer in image.layers]
    for layer, stored in zip(told["layers"], image.layers, strict=True):
        assert set(layer) == {"digest", "size", "lazy", "ref"}
        assert (layer["size"], layer["lazy"]) == (len(stored.data), True)
    assert told["layers"][-1]["ref"] == told["ref"]
    digests = {layer.digest for layer in image.layers}
    assert not [r for r in requests if r.path.rpartition("/")[2] in digests]


def test_refs_are_listed_and_shown_by_any_of_their_names(farm, pulled, program):
    """``refs show`` takes the ID, the start of it that names no other, and the image's name."""
    told, name = pulled[0], program[1]
    listed = {ref["ref"]: ref for ref in farm.cli_json("refs", "ls")["refs"]}
    for layer in told["layers"]:
        entry = listed[layer["ref"]]
        assert (entry["digest"], entry["size"]) == (layer["digest"], layer["size"])
        assert name in entry["images"]
    shown = [farm.cli_json("refs", "show", named) for named in (told["ref"], told["ref"][:19], name)]
    assert [one["ref"] for one in shown] == [told["ref"]] * 3
    assert shown[0]["providers"][0]["repository"] == "cli/program"
    assert shown[0]["tops"] == [name]
    assert [layer["ref"] for layer in shown[0]["layers"]] == [layer["ref"] for layer in told["layers"]]
    leases = farm.cli_json("leases", "ls")["leases"]
    assert set(shown[0]["leases"]) <= {lease["id"] for lease in leases}
    assert shown[0]["leases"]


def test_an_image_that_no_disk_can_hold_says_so(farm, registry_server):
    """What its layers will come to is known before a byte is fetched: one clear line, and nothing was asked for."""
    image = fresh_image(layers=2)
    told = json.loads(image.manifest)
    told["layers"][0]["size"] = 1 << 50
    image = replace(image, manifest=json.dumps(told).encode())
    registry_server.push("cli/huge", "1", image)
    name = f"{registry_server.host}/cli/huge:1"
    farm.cli("pull", name)
    registry_server.forget()
    done = farm.cli("extract", "--node", "n1", name, check=False)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(rf"/n1: extracting {name} can never fit: it takes [0-9,]+ bytes or more, and the whole disk", line)
    assert "(hint: `lazyfarm prune --nodes`" in line
    assert layer_gets(registry_server, image) == 0


def test_a_retag_and_a_push_to_another_repository_read_no_layer(farm, registry_server, pulled, program):
    """What the registry has is not moved: it exists there, or is mounted."""
    (told, _), (image, name) = pulled, program
    registry_server.forget()
    retagged = farm.cli_json("push", told["ref"], f"{name}-again")
    moved = farm.cli_json("push", name, f"{registry_server.host}/cli/elsewhere:2")
    assert set(retagged) == set(moved) == {"target", "digest", "layers"}
    assert retagged["digest"] == moved["digest"] == image.digest
    assert moved["target"] == f"{registry_server.host}/cli/elsewhere:2"
    assert [layer["digest"] for layer in moved["layers"]] == [layer.digest for layer in image.layers]
    assert {layer["how"] for layer in retagged["layers"]} == {"exists"}
    assert {layer["how"] for layer in moved["layers"]} == {"mounted"}
    assert {layer["bytes"] for layer in retagged["layers"] + moved["layers"]} == {0}
    assert layer_gets(registry_server, image) == 0
    assert farm.cli_json("refs", "show", told["ref"])["lazy"]
    again = registry_server.call("GET", "/v2/cli/elsewhere/manifests/2", headers={"Accept": image.media_type})
    assert (again[0], again[2]) == (200, image.manifest)


def test_unlazy_says_what_it_fetched_and_what_was_there(farm, registry_server, pulled, program):
    """Each layer comes from the registry once; asked again, all are present and nothing moves."""
    (told, _), (image, _) = pulled, program
    registry_server.forget()
    first, second = (farm.cli_json("unlazy", told["ref"]) for _ in range(2))
    for result in (first, second):
        assert set(result) == {"ref", "layers"}
        assert result["ref"] == told["ref"]
        assert [layer["digest"] for layer in result["layers"]] == [layer.digest for layer in image.layers]
        assert all(set(x) == {"digest", "source", "bytes", "seconds", "joined"} for x in result["layers"])
    assert [layer["bytes"] for layer in first["layers"]] == [len(layer.data) for layer in image.layers]
    # Any repository will do that has it, also the one that it was pushed to.
    assert {layer["source"].partition("/cli/")[0] for layer in first["layers"]} == {registry_server.host}
    assert {(x["source"], x["bytes"], x["joined"]) for x in second["layers"]} == {("present", 0, False)}
    assert layer_gets(registry_server, image) == len(image.layers)
    shown = farm.cli_json("refs", "show", told["ref"])
    assert (shown["lazy"], shown["state"]) == (False, "present")


@pytest.mark.root
def test_a_program_runs_from_the_root_extracted_on_every_node(farm, pulled):
    """``--all-nodes`` mounts it everywhere; a node of one's choice has the same mount."""
    ref = pulled[0]["ref"]
    everywhere = farm.cli_json("extract", ref, "--all-nodes")
    assert set(everywhere) == {"ref", "nodes"}
    assert everywhere["ref"] == ref
    assert sorted(node["node"] for node in everywhere["nodes"]) == ["n0", "n1", "n2"]
    for node in everywhere["nodes"]:
        assert set(node) == {"node", "path", "seconds"}
        ran = subprocess.run(["chroot", node["path"], "/srv/hello"], capture_output=True, text=True, check=True)
        assert ran.stdout.startswith("hello from layer")
    (one,) = farm.cli_json("extract", ref, "--node", "n1")["nodes"]
    assert one["path"] == next(node["path"] for node in everywhere["nodes"] if node["node"] == "n1")


def test_without_a_terminal_people_get_plain_lines(farm, registry, program):
    """No control characters, whatever the command; a line for each layer that ends."""
    registry.push("cli/plain", "1", image := fresh_image(layers=2))
    name = f"{registry.host}/cli/plain:1"
    said = [farm.cli("pull", name).stdout, farm.cli("extract", name).stdout]
    said += [farm.cli(*words).stdout for words in (("refs", "ls"), ("refs", "show", name), ("leases", "ls"))]
    for text in said:
        assert text.isprintable() or not re.search(r"[^\x20-\x7e\n…]", text)
    assert "2 layers, 2 lazy" in said[0]
    for layer in image.layers:
        assert re.search(rf"fetch {layer.digest[:19]} +done", said[1])
    assert re.search(r"^n[012] .* /", said[1], re.MULTILINE)


def test_a_command_that_joins_the_farm_imports_no_tables(farm, registry):
    """Ray would, where pyarrow is there, and as it is for the examples: the first call of a process waits for it."""
    assert find_spec("pyarrow") is not None
    registry.push("cli/lean", "1", fresh_image(layers=1))
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "lazyfarm", "pull", f"{registry.host}/cli/lean:1"],
        env={**os.environ, **farm.environ, "LAZYFARM_STATE_DIR": str(farm.state_dir)},
        capture_output=True,
        text=True,
        timeout=SOON_S,
        check=True,
    ).stderr
    imported = {line.rpartition("|")[2].strip() for line in told.splitlines()}
    assert "ray._raylet" in imported
    assert imported & {"numpy", "pandas", "pyarrow.lib"} == set()


def test_on_a_terminal_layers_have_live_bars(farm, registry):
    """A bar for each layer that is redrawn in place, then the result."""
    registry.push("cli/bars", "1", image := fresh_image(layers=2, layer_bytes=3 * MIB))
    name = f"{registry.host}/cli/bars:1"
    farm.cli("pull", name)
    ours, theirs = pty.openpty()
    with command(farm, "unlazy", name, stdout=theirs, stderr=theirs, stdin=theirs) as process:
        os.close(theirs)
        shown = _read_all(ours)
        assert process.wait(SOON_S) == 0, shown
    assert "\x1b[" in shown
    assert "━" in shown
    for layer in image.layers:
        assert f"fetch {layer.digest[:19]}" in shown
    assert "2 layers present" in shown


def _read_all(terminal):
    """Read what is written to a terminal until the last writer has gone."""
    pieces = []
    with contextlib.suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as stream:  # EIO: nobody is there
        while select.select([stream], [], [], SOON_S)[0] and (piece := stream.read(65536)):
            pieces.append(piece)
    return b"".join(pieces).decode()


def test_a_second_caller_joins_the_flight_of_the_first(farm, registry, registry_proxy):
    """It is told that it joined, that it fetched nothing, and whose flight it was."""
    registry.push("cli/joined", "1", image := fresh_image(layers=1, layer_bytes=6 * MIB))
    name = f"{registry_proxy.host}/cli/joined:1"
    ref = farm.cli_json("pull", name)["ref"]
    registry_proxy.bytes_per_s = 1 * MIB
    with command(farm, "unlazy", ref, "--json") as first, command(farm, "unlazy", ref, "--json") as second:
        told = [json.loads(process.communicate(timeout=60)[0])["layers"][0] for process in (first, second)]
    owner, joiner = sorted(told, key=lambda layer: layer["joined"])
    size = len(image.layers[0].data)
    assert (owner["joined"], owner["bytes"]) == (False, size)
    assert (joiner["joined"], joiner["bytes"]) == (True, 0)
    assert registry_proxy.blob_bytes[image.layers[0].digest] == size


# -- ways to say what is meant -------------------------------------------------------------------------------


def test_the_platform_chooses_from_an_index(farm, registry):
    """One name, an image a platform; a platform that isn't there is an error that says which are."""
    images = {
        platform: build_image(
            [build_layer({"which": f"{platform} {secrets.token_hex(4)}".encode()})], platform=platform
        )
        for platform in ("linux/amd64", "linux/arm64")
    }
    registry.push("cli/platforms", "1", build_index(images))
    name = f"{registry.host}/cli/platforms:1"
    told = farm.cli_json("pull", name, "--platform", "linux/arm64")
    assert told["layers"][0]["digest"] == images["linux/arm64"].layers[0].digest
    error = fails(farm, "pull", name, "--platform", "linux/s390x")
    assert "linux/s390x" in error["message"]
    assert "linux/arm64" in error["message"] + error["hint"]


def test_plain_http_is_spoken_off_loopback_only_when_asked_for(farm):
    """A registry without TLS on another address needs ``--plain-http``."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            pytest.skip("the machine has no address but loopback")
        address = probe.getsockname()[0]
    with docker_registry({"http": {"addr": "0.0.0.0:0"}}) as server:
        server.push("cli/plain-http", "1", image := fresh_image(layers=1))
        name = f"{address}:{server.host.rpartition(':')[2]}/cli/plain-http:1"
        error = fails(farm, "pull", name)
        assert name.partition("/")[0] in error["message"]
        assert farm.cli_json("pull", name, "--plain-http")["digest"] == image.digest


# -- errors --------------------------------------------------------------------------------------------------

_ABSENT = "sha256:" + "0" * 64


@pytest.mark.parametrize(
    ("arguments", "error_type", "word"),
    [
        (("refs", "show", _ABSENT), "RefNotFoundError", _ABSENT),
        (("unlazy", "no/such:image"), "RefNotFoundError", "no/such:image"),
        (("extract", _ABSENT), "RefNotFoundError", _ABSENT),
        (("push", _ABSENT, "127.0.0.1:1/a/b"), "RefNotFoundError", _ABSENT),
        (("pull", "UPPER/Case::1"), "InvalidReferenceError", "UPPER/Case::1"),
        (("pull", "debian", "--platform", "nonsense"), "InvalidPlatformError", "nonsense"),
        (("push", _ABSENT, "not a target"), "InvalidReferenceError", "not a target"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_is_unknown_or_malformed_is_named(farm, arguments, error_type, word):
    """A typed error that names what was asked for."""
    error = fails(farm, *arguments)
    assert error["type"] == error_type
    assert word in error["message"]
    assert error["hint"]


def test_a_digest_that_the_registry_lacks_is_named(farm, registry):
    """Unknown repository, tag or digest: what was asked for, and where."""
    registry.push("cli/known", "1", fresh_image(layers=1))
    for name in (f"{registry.host}/cli/known@{_ABSENT}", f"{registry.host}/cli/known:2", f"{registry.host}/cli/un:1"):
        error = fails(farm, "pull", name)
        assert registry.host in error["message"]
        assert name.rpartition("/")[2].replace("@", ":").partition(":")[2] in error["message"]


def test_a_node_that_is_not_there_is_named(farm, pulled):
    """``--node`` of no live node: its name, and where to look."""
    error = fails(farm, "extract", pulled[0]["ref"], "--node", "n9")
    assert error["type"] == "NodeNotFoundError"
    assert "n9" in error["message"]
    assert "status" in error["hint"]


def test_a_registry_that_is_down_is_named(farm):
    """Nobody listens: the address, within the registry's retry budget."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        error = fails(farm, "pull", f"{address}/a/b:1")
    assert address in error["message"]


def test_a_registry_that_wants_a_login_is_named_and_so_is_the_remedy(farm, tmp_path):
    """Refused without credentials, and with wrong ones; docker's config.json of the caller opens it."""
    with docker_registry(htpasswd_config(tmp_path)) as server:
        login = {"auths": {server.host: {"auth": "YWxpY2U6d29uZGVybGFuZA=="}}}
        name = f"{server.host}/cli/private:1"
        config = tmp_path / "docker"
        config.mkdir()
        farm.environ["DOCKER_CONFIG"] = str(config)
        try:
            error = fails(farm, "pull", name)
            assert server.host in error["message"]
            assert "login" in error["hint"] or "credential" in error["hint"]
            assert "wonderland" not in json.dumps(error)
            (config / "config.json").write_text(json.dumps(login))
            # Let in: what isn't there is another error.
            assert fails(farm, "pull", name)["type"] != error["type"]
        finally:
            del farm.environ["DOCKER_CONFIG"]


def test_an_error_for_people_is_one_line(farm):
    """On stderr, with the hint; stdout stays empty."""
    done = farm.cli("refs", "show", _ABSENT, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: [^\n]+ \(hint: [^\n]+\)\n", done.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ("status",),
        ("refs", "ls"),
        ("leases", "ls"),
        ("pull", "debian"),
        ("unlazy", "debian"),
        ("extract", "debian"),
        ("push", "debian", "a/b"),
    ],
    ids=" ".join,
)
def test_without_a_farm_every_command_says_so(farm, tmp_path, arguments):
    """Nothing was brought up there: which directory, and how to bring it up."""
    error = fails(farm, *arguments, "--state-dir", str(tmp_path))
    assert error["type"] == "FarmNotRunningError"
    assert str(tmp_path) in error["message"]
    assert "lazyfarm up" in error["hint"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ("pull",),
        ("pull", "a", "b"),
        ("frobnicate",),
        ("up", "--nodes", "0"),
        ("extract", "r", "--node", "a", "--all-nodes"),
    ],
    ids=" ".join,
)
def test_wrong_usage_is_exit_2(farm, arguments):
    """Told on stderr, with nothing on stdout."""
    done = farm.cli(*arguments, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Usage: lazyfarm" in done.stderr


# -- interrupts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ctrl_c_in_the_middle_leaves_nothing_behind(farm, registry, registry_proxy, number):
    """Exit 130; its lease is gone, the flight is vacated, no bytes stay staged, and the next caller succeeds."""
    registry.push("cli/interrupted", "1", image := fresh_image(layers=1, layer_bytes=24 * MIB))
    name = f"{registry_proxy.host}/cli/interrupted:1"
    digest = image.layers[0].digest
    ref = farm.cli_json("pull", name)["ref"]
    before = driver_leases(farm)
    registry_proxy.bytes_per_s = 2 * MIB
    with command(farm, "unlazy", ref, "--json") as process:
        until(lambda: registry_proxy.blob_bytes[digest] > MIB, "the fetch has begun")
        process.send_signal(number)
        out, err = process.communicate(timeout=SOON_S)
    assert process.returncode == 130, err
    assert json.loads(out)["error"]["type"] == "Interrupted"
    assert err == ""
    assert driver_leases(farm) == before
    staged = Path(farm.state_dir, "nodes")
    until(lambda: not list(staged.glob("n*/cache/staging/*")), "staging files are removed")
    until(lambda: _flight(farm, digest) is None, "the flight is vacated")
    registry_proxy.bytes_per_s = None
    (layer,) = farm.cli_json("unlazy", ref)["layers"]
    assert not layer["joined"]
    assert layer["source"] == f"{registry_proxy.host}/cli/interrupted"


def _flight(farm, digest):
    """Return the owner of a blob's flight; None where nobody flies."""
    import redis  # noqa: PLC0415 - looked at by one test

    running = farm.settings.config.redis
    client = redis.Redis.from_url(running.url, password=Path(running.password_file).read_text().strip())
    with contextlib.closing(client):
        return client.hget(f"lf:{{{farm.settings.config.farm.name}}}:flight:blob:{digest}", "owner")
