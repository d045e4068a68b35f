"""What the doctor says of what it finds; against a real farm it is tried in tests/cluster."""

import os
import shutil
import socket
from types import SimpleNamespace

import pytest

from lazyfarm import doctor
from lazyfarm.doctor import examine
from lazyfarm.settings import Running
from storage.farm_file import write_running


@pytest.fixture
def environ(tmp_path):
    return {"LAZYFARM_STATE_DIR": str(tmp_path / "state"), "PATH": os.environ["PATH"]}


def by_check(findings):
    return {finding.check: finding for finding in findings}


def test_a_machine_without_a_farm_is_examined_all_the_same(environ, tmp_path):
    """`doctor` is for before the first `up`, too; it makes no directory."""
    found = by_check(examine(None, environ))
    assert {"python", "packages", "configuration", "disk", "overlayfs", "farm"} <= found.keys()
    assert found["python"].ok == "ok"
    assert (found["farm"].ok, found["farm"].advice) == ("warn", "lazyfarm up")
    assert "s3" not in found
    assert not (tmp_path / "state").exists()


def test_every_finding_that_is_not_ok_says_what_to_do(environ):
    """A complaint without advice is half a finding."""
    environ["LAZYFARM__FETCH__ATTEMPTS"] = "0"
    findings = examine(None, environ)
    assert by_check(findings)["configuration"].ok == "fail"
    assert [finding for finding in findings if finding.ok != "ok" and not finding.advice] == []


def test_services_that_are_gone_are_named(environ, tmp_path):
    """One finding each, and none of them hides another."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    (tmp_path / "state").mkdir()
    write_running(
        tmp_path / "state",
        Running(
            farm_id="x",
            farm_name="lazyfarm",
            redis_url=f"redis://127.0.0.1:{free}/0",
            s3_endpoint=f"http://127.0.0.1:{free}",
            s3_region="us-east-1",
            s3_bucket="lazyfarm",
            ray_address=f"127.0.0.1:{free}",
        ),
    )
    found = by_check(examine(None, environ))
    assert {name for name in ("redis", "s3", "ray") if found[name].ok == "fail"} == {"redis", "s3", "ray"}
    assert found["s3"].advice == "lazyfarm up"


@pytest.mark.parametrize(
    ("redis_wall_s", "verdict"),
    [(1000.0, "ok"), (1000.5, "ok"), (997.0, "ok"), (1010.0, "warn"), (990.0, "warn"), (2000.0, "fail")],
)
def test_the_clock_is_judged_by_redis_s(redis_wall_s, verdict):
    """The time that the question took is nobody's skew."""
    assert doctor._clock(redis_wall_s, 1000.0, 1001.0).ok == verdict


@pytest.mark.parametrize(
    ("facts", "verdict"),
    [
        ({"aof_enabled": "1", "aof_last_write_status": "ok"}, "ok"),
        ({"aof_enabled": "0"}, "fail"),
        ({}, "fail"),
        ({"aof_enabled": "1", "aof_last_write_status": "err"}, "fail"),
    ],
)
def test_redis_has_to_keep_what_it_is_given(facts, verdict):
    """Append-only, and able to append."""
    assert doctor._persistence(facts).ok == verdict


@pytest.mark.parametrize(("free_gib", "verdict"), [(100, "ok"), (5, "warn"), (0.5, "fail")])
def test_a_full_disk_is_told_before_it_bites(free_gib, verdict, environ, monkeypatch):
    """Warned of below 10 GiB, failed below 1."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=int(free_gib * 1024**3)))
    assert by_check(examine(None, environ))["disk"].ok == verdict


def test_a_ca_file_that_is_none_is_a_finding(environ, tmp_path):
    """Better here than as a failed handshake in the middle of a pull."""
    bad = tmp_path / "ca.pem"
    bad.write_text("not a certificate")
    environ["LAZYFARM__REGISTRIES__DEFAULT__CA_FILE"] = str(bad)
    found = by_check(examine(None, environ))["certificates"]
    assert found.ok == "fail"
    assert str(bad) in found.detail


def test_secrets_that_others_may_read_are_a_finding(environ, tmp_path):
    """The directory is made 0700; somebody opened it."""
    secrets = tmp_path / "state" / "secrets"
    secrets.mkdir(parents=True)
    secrets.chmod(0o755)
    found = by_check(examine(None, environ))["state directory"]
    assert (found.ok, found.advice) == ("fail", f"chmod 700 {secrets}")


def test_a_check_that_trips_does_not_hide_the_others(environ, monkeypatch):
    """What can't be checked is said to be so."""

    def trip(_path):
        raise RuntimeError("odd")

    monkeypatch.setattr(shutil, "disk_usage", trip)
    found = by_check(examine(None, environ))
    assert found["disk"].ok == "warn"
    assert "odd" in found["disk"].detail
    assert "runc" in found
