"""Metrics, alerts and the dashboard, with a real Prometheus that scrapes the farm by the configuration that we give."""

from __future__ import annotations

import asyncio
import http.server
import json
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from cluster.errors import CircuitOpenError, ClusterError, ManifestNotFoundError, RefNotFoundError
from cluster.metrics import METRICS
from lazyfarm.graph import image, scratch
from storage.services.loopback import choose_ports
from tests.doubles.gateway import Gateway
from tests.doubles.registry import docker_registry, random_image

_ROOT = Path(__file__).resolve().parents[2]
_CONFIGS = _ROOT / "configs"
_RULES = _CONFIGS / "prometheus/alerts.yml"
_OURS = re.compile(r"\bray_lazyfarm_\w+")
_TELLS_WHAT_IS_LEFT = {"http": {"headers": {"RateLimit-Limit": ["1000;w=60"], "RateLimit-Remaining": ["976;w=60"]}}}
#: Ray's workers hand their metrics over every ten seconds.
_HANDED_OVER_S = 60.0
_START_S = 30.0

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.registry,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]


def _promtool(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["promtool", *arguments], input=stdin, capture_output=True, text=True, timeout=60, check=False
    )


@dataclass
class _Prometheus:
    """A Prometheus that runs."""

    port: int

    def ask(self, path: str, **query: str) -> object:
        """Return the ``data`` of an answer of its API."""
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}", timeout=10
        ) as answer:
            return json.load(answer)["data"]

    def names(self) -> set[str]:
        """Return the names of all metrics that it has."""
        return set(self.ask("label/__name__/values"))

    def query(self, expression: str) -> list[dict]:
        """Evaluate an expression now."""
        return self.ask("query", query=expression)["result"]

    def firing(self, alert: str) -> list[dict[str, str]]:
        """Return the labels that an alert fires with."""
        found = (one for one in self.ask("alerts")["alerts"] if one["state"] == "firing")
        return [one["labels"] for one in found if one["labels"]["alertname"] == alert]


@pytest.fixture
def prometheus(farm, tmp_path) -> Iterator[_Prometheus]:
    """Scrape the farm by ``configs/prometheus``, more often than that says."""
    shutil.copytree(_CONFIGS / "prometheus", tmp_path / "configs")
    config = tmp_path / "configs/prometheus.yml"
    text = config.read_text().replace("/var/lib/lazyfarm", str(farm.state_dir)).replace("15s", "1s")
    assert str(farm.state_dir / "run/prometheus-targets.json") in text
    config.write_text(text)
    rules = tmp_path / "configs/alerts.yml"
    rules.write_text(re.sub(r"\bfor: \d+m\b", "for: 1s", rules.read_text()))  # nobody waits for five minutes
    assert _promtool("check", "config", str(config)).returncode == 0
    port = choose_ports(["web"], {})["web"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={config}",
                f"--storage.tsdb.path={tmp_path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=warn",
            ],
            stdout=out,
            stderr=out,
        )
    try:
        yield _started(port, process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def _started(port: int, process: subprocess.Popen[bytes], log: Path) -> _Prometheus:
    give_up_s = time.monotonic() + _START_S
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5):
                return _Prometheus(port)
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up_s, log.read_text()
            time.sleep(0.1)


def _panels() -> dict[str, list[str]]:
    """Return the dashboard's expressions by panel, as Grafana would ask them."""
    dashboard = json.loads((_CONFIGS / "grafana/lazyfarm.json").read_text())
    return {
        panel["title"]: [
            target["expr"].replace("$__rate_interval", "1m").replace("$__range", "1h").replace("$farm", "lazyfarm")
            for target in panel["targets"]
        ]
        for panel in dashboard["panels"]
        if panel["type"] != "row"
    }


def _empty(prometheus: _Prometheus) -> list[str]:
    """Return the panels of which an expression selects nothing."""
    return [panel for panel, asked in _panels().items() if not all(map(prometheus.query, asked))]


def _complaints(farm) -> set[str]:
    """Return what promtool has to say of our metrics at every node's endpoint.

    Without Ray's own labels (``WorkerId``), which are on all and which it doesn't like.
    """
    found: set[str] = set()
    for group in json.loads((farm.state_dir / "run/prometheus-targets.json").read_text()):
        for target in group["targets"]:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
                told = re.sub(r'(?<=[{,])[A-Z]\w*="[^"]*",?', "", answer.read().decode())
            assert "ray_lazyfarm" in told
            checked = _promtool("check", "metrics", stdin=told)
            found |= {line for line in checked.stderr.splitlines() if "lazyfarm" in line or "error" in line}
    return found


def _unknown(text: str, names: set[str]) -> set[str]:
    """Return the metrics of ours that *text* names and nobody exports."""
    return set(_OURS.findall(text)) - names


def test_alerts_fire_when_they_should_and_not_else():
    """Each rule is valid; for each there is a farm for which it fires and one for which it doesn't."""
    checked = _promtool("check", "rules", str(_RULES))
    assert checked.returncode == 0, checked.stderr
    scenes = Path(__file__).with_name("alerts.test.yml")
    tested = _promtool("test", "rules", str(scenes))
    assert tested.returncode == 0, tested.stdout + tested.stderr

    alerts = set(re.findall(r"- alert: (\w+)", _RULES.read_text()))
    assert alerts == set(re.findall(r"alertname: (\w+)\n\s+eval_time: \w+\n\s+exp_alerts", scenes.read_text()))


def test_an_alert_that_would_not_fire_is_noticed(tmp_path):
    """With one number of one rule changed the scenes fail, and say which alert is missing."""
    shutil.copytree(_CONFIGS / "prometheus", tmp_path / "configs/prometheus")
    rules = tmp_path / "configs/prometheus/alerts.yml"
    rules.write_text(rules.read_text().replace("< 0.1\n", "< 0.01\n"))
    scenes = tmp_path / "tests/cluster/alerts.test.yml"
    scenes.parent.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("alerts.test.yml"), scenes)

    tested = _promtool("test", "rules", str(scenes))

    assert tested.returncode != 0
    assert "LazyfarmDiskFull" in tested.stdout + tested.stderr


async def _outside(gateway: Gateway) -> None:
    """Ask a gateway for what there is not, and stay there."""
    async with await gateway.connect() as driver:
        with pytest.raises(RefNotFoundError):
            await driver.kept("metrics/nothing:1")
        await asyncio.Event().wait()


async def test_all_that_alerts_and_dashboard_name_is_there(farm, registry, gateway, prometheus):
    """After some work Prometheus has every metric that a rule or a panel names; each panel shows something.

    A rule that names what nobody exports would never fire, and nobody would notice.
    """
    outside = asyncio.create_task(_outside(gateway))
    try:
        await _is_all_there(farm, registry, prometheus)
        assert not outside.done(), outside
    finally:
        outside.cancel()
        await asyncio.wait([outside])


async def _is_all_there(farm, registry, prometheus: _Prometheus) -> None:
    made = random_image(4711, layers=2)
    registry.push("metrics/app", "1", made)
    name = f"{registry.host}/metrics/app:1"
    async with await farm.connect() as driver:
        with docker_registry(_TELLS_WHAT_IS_LEFT) as telling:
            telling.push("metrics/told", "1", random_image(4712, layers=1))
            await driver.pull(f"{telling.host}/metrics/told:1")
        ref = await driver.pull(name)
        await ref.unlazy()
        await driver.solve(scratch().copy(image(name, plain_http=True), "/data-0", "/copied"))
    named = _RULES.read_text() + "".join(expression for panel in _panels().values() for expression in panel)

    give_up_s = time.monotonic() + _HANDED_OVER_S
    while unknown := _unknown(named, await asyncio.to_thread(prometheus.names)):
        assert time.monotonic() < give_up_s, f"nobody exports {sorted(unknown)}"
        await asyncio.sleep(0.5)
    # A rate takes two scrapes.
    while empty := await asyncio.to_thread(_empty, prometheus):
        assert time.monotonic() < give_up_s, f"nothing to be seen in {empty}"
        await asyncio.sleep(0.5)

    names = prometheus.names()
    shown = {metric.exported for metric in METRICS}
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in names if name.startswith("ray_lazyfarm")} == shown
    left = prometheus.query(f'ray_lazyfarm_registry_quota_remaining{{registry="{telling.host}", kind="manifest"}}')
    assert [one["value"][1] for one in left] == ["976"]
    # One that no other test makes: Ray shows for minutes what an earlier gateway of this farm told, too.
    calls = 'ray_lazyfarm_gateway_call_seconds_count{actor="gateway", call="kept"}'
    while not (ended := await asyncio.to_thread(prometheus.query, calls)):
        assert time.monotonic() < give_up_s, "nobody tells of the gateway's calls"
        await asyncio.sleep(0.5)
    assert [(one["metric"]["outcome"], one["value"][1]) for one in ended] == [("failed", "1")]
    drivers = prometheus.query('ray_lazyfarm_gateway_drivers{actor="gateway"}')
    assert {one["metric"]["state"]: one["value"][1] for one in drivers} == {"connected": "1", "gone": "0"}
    read = prometheus.query('sum(ray_lazyfarm_read_bytes_total{source="registry"})')
    assert float(read[0]["value"][1]) >= sum(len(layer.data) for layer in made.layers)
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["health"] != "ok"} == set()
    assert await asyncio.to_thread(_complaints, farm) == set()
    broken = named.replace("ray_lazyfarm_redis_failures_total", "ray_lazyfarm_redis_errors_total")
    assert _unknown(broken, names) == {"ray_lazyfarm_redis_errors_total"}


class _Refuses(http.server.BaseHTTPRequestHandler):
    """A registry that has nothing."""

    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815 - as http.server calls it

    def log_message(self, *_) -> None:
        """Say nothing."""


async def test_a_registry_that_is_away_fires_its_alert_until_it_is_back(farm, prometheus):
    """As docs/operations.md has it: `doctor` tells the last failure, and any answer, be it a refusal, ends it."""
    port = choose_ports(["registry"], {})["registry"]
    name, host = f"127.0.0.1:{port}/away/app:1", f"127.0.0.1:{port}"

    async def pulls_until(wanted: type[ClusterError]) -> None:
        give_up_s = time.monotonic() + _HANDED_OVER_S
        while True:
            with pytest.raises(ClusterError) as told:
                await driver.pull(name)
            if told.type is wanted:
                return
            assert time.monotonic() < give_up_s, told.value
            await asyncio.sleep(0.5)

    async def fires(*, wanted: bool) -> None:
        give_up_s = time.monotonic() + _HANDED_OVER_S
        while True:
            firing = await asyncio.to_thread(prometheus.firing, "LazyfarmRegistryGivenUp")
            if (host in [one["registry"] for one in firing]) is wanted:
                return
            assert time.monotonic() < give_up_s, firing
            await asyncio.sleep(0.5)

    async with await farm.connect() as driver:
        await pulls_until(CircuitOpenError)
        # Nobody asks meanwhile, so it stays given up for as long as this takes.
        await fires(wanted=True)
        findings = (await asyncio.to_thread(farm.cli_json, "doctor", check=False))["findings"]
        assert any(host in finding["detail"] for finding in findings if finding["ok"] != "ok"), findings

        with http.server.ThreadingHTTPServer(("127.0.0.1", port), _Refuses) as back:
            serving = asyncio.create_task(asyncio.to_thread(back.serve_forever))
            try:
                await pulls_until(ManifestNotFoundError)
                await fires(wanted=False)
            finally:
                back.shutdown()
                await serving
