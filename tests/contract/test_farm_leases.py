"""``lazyfarm leases`` over a real Redis, and a holder that is stopped for longer than its lease lives."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys

import pytest
from typer.testing import CliRunner

from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.errors import InvalidArgumentError, LeaseNotFoundError, RefNotFoundError
from cluster.lease import LeaseId, ref_resource
from cluster.ref import RefId, RefRecord
from lazyfarm.cli.main import app
from lazyfarm.leases import FarmLeases, open_leases
from lazyfarm.settings import load_settings
from tests.doubles.redis import redis_binaries
from tests.doubles.stores import FarmOfRedis

pytestmark = pytest.mark.redis


def layer(name):
    return Descriptor(
        media_type="application/vnd.oci.image.layer.v1.tar+gzip",
        digest=digest_of(name.encode()),
        size_bytes=10,
        diff_id=digest_of(b"tar of " + name.encode()),
    )


@pytest.fixture
async def farm(redis_servers, tmp_path):
    farm = FarmOfRedis(redis_servers(next(iter(redis_binaries()))).config, tmp_path / "state")
    yield farm
    await farm.close()


@pytest.fixture
async def known(farm):
    async with open_leases(load_settings(farm.state_dir, None, {})) as leases:
        yield leases


@pytest.fixture
async def ref(farm):
    """A ref that a driver made, whose lease is gone."""
    stores, lease = farm.stores(), LeaseId("driver-1")
    record = RefRecord.over(layer("a"), None, "docker.io/library/debian:12")
    await stores.leases.create(lease, ttl_s=60.0, labels={"owner": "driver"})
    await stores.refs.get_or_create([record], {}, lease_id=lease)
    await stores.leases.delete(lease)
    return record.id


def cli(farm, *words, code=0):
    result = CliRunner().invoke(app, ["leases", *words, "--json", "--state-dir", str(farm.state_dir)])
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def test_a_ref_is_pinned_shown_and_released(farm, ref):
    """A pin holds the ref without an expiry, or until one; releasing it lets go."""
    pinned = cli(farm, "pin", ref[:20], "--label", "why=release")
    assert pinned["expires"] is None
    assert pinned["resources"] == [ref_resource(ref)]
    assert pinned["labels"]["why"] == "release"
    timed = cli(farm, "pin", ref, "--ttl", "1h30m")
    assert timed["expires"] - timed["created"] == pytest.approx(5400)
    assert cli(farm, "show", pinned["id"]) == pinned
    assert [found["id"] for found in cli(farm, "ls")["leases"]] == [timed["id"], pinned["id"]]
    assert cli(farm, "release", pinned["id"], timed["id"]) == {"released": [pinned["id"], timed["id"]]}
    assert cli(farm, "ls")["leases"] == []


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("show", "none"), "LeaseNotFoundError"),
        (("release", "none"), "LeaseNotFoundError"),
        (("pin", "debian:99"), "RefNotFoundError"),
        (("pin", "x", "--ttl", "5"), "InvalidArgumentError"),
        (("pin", "x", "--label", "novalue"), "InvalidArgumentError"),
    ],
)
def test_what_can_not_be_done_is_one_line(farm, words, error):
    assert cli(farm, *words, code=1)["error"]["type"] == error


async def test_a_pin_that_fails_leaves_no_lease(known: FarmLeases, ref):
    """Neither for a ref that is gone, nor for a time that can't be meant."""
    with pytest.raises(RefNotFoundError):
        await known.pin([ref, RefId(digest_of(b"no such ref"))])
    with pytest.raises(InvalidArgumentError):
        await known.pin([ref], ttl_s=0)
    with pytest.raises(LeaseNotFoundError):
        await known.get(LeaseId("pin-1"))
    assert await known.leaks() == []
    assert await known._leases.leases() == []


@pytest.fixture
async def leaky(farm, ref):
    """Three pins: one that nobody made, one of a person, one on what is gone."""
    leases = farm.stores().leases
    for name, labels in (("leak-1", {"owner": "driver"}), ("fine", {"owner": "user"}), ("leak-2", {"owner": "user"})):
        await leases.create(LeaseId(name), ttl_s=None, labels=labels)
    await leases.attach(LeaseId("fine"), [ref_resource(ref)])
    await leases.attach(LeaseId("leak-2"), [ref_resource("sha256:" + "0" * 64)])


@pytest.fixture
async def long_leaky(farm, leaky):
    """The same, made long ago."""
    for name in ("leak-1", "fine", "leak-2"):
        await farm.links[0].execute("HSET", f"{farm.keys.prefix}:lease:{name}", "created", 1)


def test_what_is_new_is_no_leak(farm, leaky):
    """What it is for may not be recorded yet."""
    assert cli(farm, "leaks") == {"leaks": [], "released": False}


def test_leaks_are_found_and_released(farm, long_leaky):
    """What holds only what is gone, or was pinned by nobody, is told with its reason, and deleted on demand."""
    found = cli(farm, "leaks", code=1)["leaks"]
    assert {leak["id"]: leak["reason"] for leak in found} == {
        "leak-1": "has no expiry, and nobody has said that it is to have none",
        "leak-2": "holds only what is gone",
    }
    assert cli(farm, "leaks", "--release")["released"]
    assert [lease["id"] for lease in cli(farm, "ls")["leases"]] == ["fine"]


_HOLDER = """
import asyncio, sys
from pathlib import Path
from cluster.config import RedisConfig
from cluster.errors import LeaseLostError
from cluster.lease import LeaseId
from lazyfarm.lease import FarmLease
from storage.connect import connect
from storage.keys import Keys
from storage.leases import RedisLeaseStore

async def main(url, farm):
    link = connect(RedisConfig(url=url))
    lease = FarmLease(RedisLeaseStore(link, Keys(farm)), LeaseId("paused"))
    async with lease.held(ttl_s=1.0, labels=None):
        await lease.attach(["blob:before"])
        print("held", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        try:
            await lease.attach(["blob:after"])
        except LeaseLostError as exc:
            print(exc, flush=True)
    await link.close()

asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_holder_that_is_stopped_past_its_expiry_is_told_so_and_holds_nothing(farm):
    """SIGSTOP for longer than the lease lives: then its write is refused, and what it held is nobody's."""
    leases = farm.stores().leases
    holder = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _HOLDER, farm.config.url, farm.keys.farm),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert await holder.stdout.readline() == b"held\n"
        os.kill(holder.pid, signal.SIGSTOP)
        assert await leases.holders("blob:before") == ["paused"]
        farm.pass_time(2.0)
        assert await leases.holders("blob:before") == []
        os.kill(holder.pid, signal.SIGCONT)
        said, _ = await holder.communicate(b"go on\n")
    finally:
        with contextlib.suppress(ProcessLookupError):
            holder.kill()
    assert said == b"lease paused is lost: it expired or was deleted\n"
    assert await leases.holders("blob:after") == []
    assert await leases.leases() == []
