"""TLS to Redis and the farm's own user there: who is trusted, what may be done, and what is said when it is not.

That the user's rights are enough is what every contract suite shows: the `stores` of each log in as that user.
"""

from __future__ import annotations

import contextlib
import re
import ssl
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import storage
from cluster.config import Config, RedisConfig
from cluster.errors import ConfigError, UnavailableError
from cluster.lease import LeaseId
from cluster.settings import FarmSettings
from lazyfarm.doctor import _redis as examine_redis
from storage.connect import connect, connect_sync
from storage.keys import Keys
from storage.leases import RedisLeaseStore
from storage.renewer import RedisFlightRenewer
from tests.doubles.redis import RedisServer, documented_rights, free_port, redis_binaries
from tests.doubles.registry import Authority, make_authority

pytestmark = pytest.mark.redis

PASSWORD = "PASSWORD"
FARM = "lazyfarm"


@dataclass
class TlsRedis(RedisServer):
    """A server that speaks TLS alone."""

    authority: Authority | None = None

    @property
    def config(self) -> RedisConfig:
        assert self.authority is not None
        return RedisConfig(
            url=f"rediss://127.0.0.1:{self.port}/0",
            ca_file=str(self.authority.ca_file),
            client_cert_file=str(self.authority.certificate),
            client_key_file=str(self.authority.key),
            timeout_s=5.0,
        )


@contextlib.contextmanager
def tls_redis(directory: Path, authority: Authority, *, asks_for_certificate: bool = False):
    port = free_port()
    files = ("--tls-cert-file", authority.certificate, "--tls-key-file", authority.key)
    files = (*files, "--tls-ca-cert-file", authority.ca_file)
    rules = directory / "users.acl"
    rules.write_text(f"user {documented_rights()}\nuser default on nopass ~* &* +@all\n")
    server = TlsRedis(
        redis_binaries()["redis7"],
        str(directory),
        port,
        tuple(
            str(one)
            for one in (
                *("--port", 0, "--tls-port", port, *files, "--aclfile", rules),
                *("--tls-auth-clients", "yes" if asks_for_certificate else "no"),
            )
        ),
        authority=authority,
    )
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if "redis7" not in redis_binaries():
        pytest.skip("the system has no Redis, and the wheel's has no TLS")
    directory = tmp_path_factory.mktemp("redis-tls")
    with tls_redis(directory, make_authority(directory)) as server:
        yield server


@pytest.fixture
def as_farm(server, tmp_path) -> RedisConfig:
    """How a farm reaches it, its password in a file."""
    password = tmp_path / "password"
    password.write_text(f"{PASSWORD}\n")
    return replace(server.config, username=FARM, password_file=str(password))


def findings(config: RedisConfig):
    settings = FarmSettings(state_dir=Path("/nonexistent"), wanted=Config(redis=config))
    return list(examine_redis(settings))


# -- TLS ----------------------------------------------------------------------------------------------


async def test_all_three_clients_speak_tls_as_the_farms_user(as_farm):
    """Commands, subscriptions and the renewer's thread connect over TLS, and are who they say they are."""
    link, thread = connect(as_farm), connect_sync(as_farm)
    try:
        assert await link.execute("PING") == b"PONG"
        async with link.subscribe(Keys(FARM).events("k")) as messages:
            await link.execute("PUBLISH", Keys(FARM).events("k"), "told")
            assert await anext(messages) == b"told"
        assert thread.execute("TIME")
        assert isinstance(link.address.trust, ssl.SSLContext)
        assert PASSWORD not in repr(link.address)
    finally:
        await link.close()
        thread.close()
    renewer = RedisFlightRenewer(as_farm, Keys(FARM))
    renewer.close()


async def test_a_server_of_an_unknown_authority_is_not_spoken_with(as_farm, tmp_path):
    """Not the system's authorities, not another one: no password is sent, and `doctor` says what to set."""
    other = make_authority(tmp_path)
    for config in (replace(as_farm, ca_file=""), replace(as_farm, ca_file=str(other.ca_file))):
        link = connect(replace(config, timeout_s=1.0))
        with pytest.raises(UnavailableError):
            await link.execute("PING")
        await link.close()
        with pytest.raises(UnavailableError, match=r"(?i)certificate"):
            connect_sync(config).execute("PING")
        (finding,) = findings(config)
        assert finding.ok == "fail"
        assert "redis.ca_file" in finding.advice


def test_a_certificate_is_for_its_own_name(as_farm):
    """A server that has the certificate of another name is not spoken with."""
    (finding,) = findings(replace(as_farm, url=as_farm.url.replace("127.0.0.1", "127.0.0.2")))
    assert finding.ok == "fail"


def test_a_server_that_asks_for_a_certificate_is_shown_one(tmp_path):
    """With the certificate all goes; without, `doctor` says which keys to set."""
    authority = make_authority(tmp_path)
    with tls_redis(tmp_path, authority, asks_for_certificate=True) as server:
        link = connect_sync(server.config)
        assert link.execute("PING") == b"PONG"
        link.close()
        (finding,) = findings(replace(server.config, client_cert_file="", client_key_file=""))
        assert finding.ok == "fail"
        assert "redis.client_cert_file" in finding.advice


@pytest.mark.parametrize("key", ["ca_file", "client_cert_file", "client_key_file"])
def test_a_file_that_is_no_certificate_is_told_by_its_key(as_farm, tmp_path, key):
    """Before anything is connected: which key, which file."""
    garbage = tmp_path / "garbage.pem"
    garbage.write_text("no certificate")
    with pytest.raises(ConfigError, match=rf"redis\.{key}"):
        connect(replace(as_farm, **{key: str(garbage)}))


def test_plain_text_to_a_tls_port_and_back_is_a_fault(server, as_farm):
    """Neither hangs, and neither goes on without TLS."""
    (finding,) = findings(replace(as_farm, url=f"redis://127.0.0.1:{server.port}/0"))
    assert finding.ok == "fail"
    with contextlib.ExitStack() as stack:
        plain = RedisServer(server.binary, server.directory, free_port())
        plain.start()
        stack.callback(plain.kill)
        (finding,) = findings(replace(as_farm, url=f"rediss://127.0.0.1:{plain.port}/0", timeout_s=1.0))
        assert finding.ok == "fail"


# -- the farm's user ------------------------------------------------------------------------------------


@pytest.mark.parametrize("username", ["nobody", FARM])
def test_a_wrong_login_is_told(as_farm, tmp_path, username):
    """An unknown user and a wrong password are refused alike, and `doctor` says which keys name them."""
    password = tmp_path / "another"
    password.write_text("hunter2")
    (finding,) = findings(replace(as_farm, username=username, password_file=str(password)))
    assert finding.ok == "fail"
    assert "redis.username" in finding.advice
    assert "hunter2" not in finding.detail


async def test_a_user_with_a_right_too_few_is_told(server, as_farm):
    """What is refused is told by name, and `doctor` says where the rights are listed."""
    admin = server.link()
    admin.execute("ACL", "SETUSER", "lesser", *documented_rights().split(" ")[1:], "-info")
    (finding,) = findings(replace(as_farm, username="lesser"))
    admin.close()
    assert finding.ok == "fail"
    assert "docs/operations.md" in finding.advice
    assert "info" in finding.detail


async def test_keys_and_channels_of_others_and_the_server_itself_are_refused(as_farm):
    """Another farm's keys, keys of no farm, its channels, and what changes the server: by command and by script."""
    link = connect(as_farm)
    other = Keys("lazyfarm2")
    refused = [
        ("GET", other.refs),
        ("SET", other.refs, "x"),
        ("GET", "lf:lazyfarm:refs"),
        ("DEL", "anything"),
        ("EVAL", "return redis.call('GET', KEYS[1])", 1, other.refs),
        ("EVAL", "return redis.call('FLUSHALL')", 0),
        ("PUBLISH", other.events("k"), "x"),
        ("SUBSCRIBE", other.events("k")),
        *(("KEYS", "*"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST")),
        *(("SHUTDOWN",), ("MONITOR",), ("REPLICAOF", "NO", "ONE"), ("CLIENT", "LIST"), ("SCRIPT", "FLUSH")),
    ]
    try:
        for command in refused:
            with pytest.raises(UnavailableError, match=r"NOPERM|user executing the script can't|No permissions"):
                await link.execute(*command)
        # What is the farm's own goes on.
        leases = RedisLeaseStore(link, Keys(FARM))
        await leases.create(LeaseId("mine"), ttl_s=60.0, labels={})
        assert (await leases.get(LeaseId("mine"))) is not None
    finally:
        await link.close()


def test_every_command_that_the_code_names_is_a_right():
    """Commands of scripts and of Python alike are in the documented line, which has nothing dangerous but INFO."""
    root = Path(storage.__file__).parent
    named = set()
    for path in root.rglob("*.lua"):
        named |= set(re.findall(r"redis\.p?call\(\s*['\"](\w+)['\"]", path.read_text()))
    by_python = re.compile(r"(?:execute\(|_write\(\(|\(|\[\()\s*\"([A-Z]{3,})\", (?:self\._keys|\*?keys?\b|ref\()")
    for path in root.rglob("*.py"):
        named |= set(by_python.findall(path.read_text()))
    assert {"HSET", "EXISTS", "MGET", "XREAD"} <= named | {"XREAD"}
    rights = {right[1:].partition("|")[0].upper() for right in documented_rights().split(" ") if right[0] == "+"}
    assert not named - rights, f"rights that docs/operations.md lacks: {' '.join(sorted(named - rights)).lower()}"
    admin = {
        "KEYS",
        "FLUSHALL",
        "FLUSHDB",
        "CONFIG",
        "ACL",
        "DEBUG",
        "SHUTDOWN",
        "MONITOR",
        "SORT",
        "MIGRATE",
        "RESTORE",
    }
    assert not rights & admin
    assert "~*" not in documented_rights()
    assert "allkeys" not in documented_rights()
