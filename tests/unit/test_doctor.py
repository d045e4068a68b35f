"""What the doctor says of what it finds; against a real farm it is tried in tests/cluster."""

import datetime as dt
import json
import os
import shutil
import socket
import ssl
import subprocess
import threading
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest

from cluster.config import Config, GatewayConfig, RayConfig, WebConfig
from lazyfarm import doctor
from lazyfarm.doctor import examine
from lazyfarm.settings import Running
from storage.farm_file import write_running
from tests.doubles.registry import make_authority


@pytest.fixture
def environ(tmp_path):
    return {"LAZYFARM_STATE_DIR": str(tmp_path / "state"), "PATH": os.environ["PATH"]}


@pytest.fixture
def running(tmp_path):
    """What `up` recorded, of services that are gone."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    (tmp_path / "state").mkdir()
    return Running(
        farm_id="x",
        farm_name="lazyfarm",
        redis_url=f"redis://127.0.0.1:{free}/0",
        s3_endpoint=f"http://127.0.0.1:{free}",
        s3_region="us-east-1",
        s3_bucket="lazyfarm",
        ray_address=f"127.0.0.1:{free}",
        ray_jobs_url=f"http://127.0.0.1:{free}",
    )


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


def test_traces_that_are_asked_for_and_have_no_exporter_are_named(environ, monkeypatch):
    """With the extra that has it; where none are asked for, nothing is said."""
    assert "traces" not in by_check(examine(None, environ))
    environ["LAZYFARM__TRACING__ENDPOINT"] = "http://127.0.0.1:1"
    assert by_check(examine(None, environ))["traces"].ok == "ok"

    def missing(package):
        if package.startswith("opentelemetry"):
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(doctor, "version", missing)
    found = by_check(examine(None, environ))["traces"]
    assert (found.ok, "lazyfarm[otel]" in found.advice) == ("warn", True)


def test_services_that_are_gone_are_named(environ, running, tmp_path):
    """One finding each, and none of them hides another."""
    write_running(tmp_path / "state", running)
    found = by_check(examine(None, environ))
    gone = {"redis", "s3", "ray", "jobs", "page"}
    assert {name for name in gone if found[name].ok == "fail"} == gone
    assert found["s3"].advice == found["jobs"].advice == found["page"].advice == "lazyfarm up"


@contextmanager
def job_server(token):
    """A server that says its release to who has the token, as Ray's does."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            is_known = self.path == "/api/version" and self.headers["Authorization"] == f"Bearer {token}"
            body = json.dumps({"ray_version": "2.60.0"}).encode() if is_known else b"Unauthorized"
            self.send_response(200 if is_known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_job_submission_is_tried_with_the_farm_s_token(environ, running, tmp_path):
    """A server that answers nobody, and one that refuses the farm's own token, take no jobs; no finding shows it."""
    token = tmp_path / "ray-token"
    token.write_text("t0k3n\n")
    with job_server("t0k3n") as url:
        write_running(tmp_path / "state", replace(running, ray_token_file=str(token), ray_jobs_url=url))
        found = by_check(examine(None, environ))["jobs"]
        assert (found.ok, url in found.detail, "2.60.0" in found.detail) == ("ok", True, True)
        token.write_text("another")
        found = by_check(examine(None, environ))["jobs"]
        assert (found.ok, found.advice) == ("fail", "lazyfarm up")
        assert "401" in found.detail
        assert "another" not in found.detail


def test_job_submission_that_nobody_asked_for_is_no_fault(environ, running, tmp_path):
    """Turned off, it is said to be; a cluster of somebody else's is not looked at."""
    off = replace(running, ray_jobs_url="", config=Config(ray=RayConfig(dashboard=False)))
    write_running(tmp_path / "state", off)
    found = by_check(examine(None, environ))["jobs"]
    assert (found.ok, "ray.dashboard" in found.detail) == ("ok", True)
    write_running(tmp_path / "state", replace(off, config=Config(ray=RayConfig(address=running.ray_address))))
    assert "jobs" not in by_check(examine(None, environ))


def test_a_page_that_nobody_asked_for_is_no_fault(environ, running, tmp_path):
    """Turned off, it is said to be."""
    write_running(tmp_path / "state", replace(running, config=Config(web=WebConfig(enabled=False))))
    found = by_check(examine(None, environ))["page"]
    assert (found.ok, "web.enabled" in found.detail) == ("ok", True)


def test_a_gateway_is_looked_for_where_up_starts_it(environ, running, tmp_path):
    """Not where nobody wants one, or somebody else starts it; what its log says is named."""
    assert "gateway" not in by_check(examine(None, environ))
    write_running(tmp_path / "state", replace(running, config=Config(gateway=GatewayConfig(enabled=True))))
    found = by_check(examine(None, environ))["gateway"]
    assert (found.ok, found.detail) == ("fail", "the gateway doesn't answer")
    assert found.advice == f"lazyfarm up; {tmp_path / 'state' / 'logs' / 'gateway.log'} says why"


@contextmanager
def tls_server(authority):
    """A server that shows a certificate, and says nothing."""
    shown = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    shown.load_cert_chain(authority.certificate, authority.key)

    def serve():
        with suppress(OSError):  # it is closed; a client goes away when it has seen enough
            while True:
                connection, _ = server.accept()
                with suppress(OSError), shown.wrap_socket(connection, server_side=True) as opened:
                    opened.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"https://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


@pytest.mark.parametrize(
    ("lasts", "verdict", "said"),
    [(90, "ok", "ends in 90 d"), (3, "warn", "ends in 3 d"), (-1, "fail", "certificate has expired")],
)
def test_a_gateways_certificate_is_missed_before_its_drivers_do(tmp_path, lasts, verdict, said):
    """The one that is shown."""
    authority = make_authority(tmp_path, lasts=dt.timedelta(days=lasts, hours=1))
    with tls_server(authority) as url:
        found = doctor.certificate_finding(url, str(authority.certificate))
    assert (found.ok, said in found.detail, url in found.detail) == (verdict, True, True)
    assert ("gateway.cert_file" in found.advice) == (verdict != "ok")


def test_another_certificate_than_the_files_is_shown(tmp_path):
    """As for half a minute after an exchange; or the address is another server's."""
    for each in ("shown", "file"):
        (tmp_path / each).mkdir()
    with tls_server(make_authority(tmp_path / "shown")) as url:
        found = doctor.certificate_finding(url, str(make_authority(tmp_path / "file").certificate))
    assert (found.ok, "unable to get local issuer" in found.detail) == ("fail", True)
    found = doctor.certificate_finding(url, str(tmp_path / "none"))
    assert (found.ok, f"{tmp_path / 'none'}, can't be looked at" in found.detail) == ("warn", True)


def test_runc_is_named_as_what_run_ops_need(environ, monkeypatch):
    """With it and without."""
    said = subprocess.CompletedProcess([], 0, stdout="runc version 1.1.5\n")
    monkeypatch.setattr(subprocess, "run", lambda *_arguments, **_options: said)
    for path, verdict in (("/usr/sbin/runc", "ok"), (None, "warn")):
        monkeypatch.setattr(doctor, "_which", lambda _command, path=path: path)
        found = by_check(examine(None, environ))["runc"]
        assert (found.ok, "`run` ops" in found.detail) == (verdict, True)


@pytest.mark.parametrize(
    ("connected", "wanted", "verdicts"),
    [(0, 0, []), (1, 1, ["ok"]), (2, 1, ["ok"]), (1, 0, ["warn"]), (0, 1, ["fail"]), (1, 2, ["fail"])],
)
def test_replicas_are_judged_by_how_many_a_deletion_waits_for(connected, wanted, verdicts):
    """Too few stop the collection; ones that nobody waits for may take over with less than is known."""
    assert [finding.ok for finding in doctor._replicas(connected, wanted)] == verdicts


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
