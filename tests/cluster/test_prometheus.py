"""Metrics, alerts and the dashboard, with a real Prometheus that scrapes the farm by the configuration that we give."""

from __future__ import annotations

import asyncio
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

from cluster.metrics import METRICS
from lazyfarm.graph import image, scratch
from storage.services.loopback import choose_ports
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


def _promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], capture_output=True, text=True, timeout=60, check=False)


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


@pytest.fixture
def prometheus(farm, tmp_path) -> Iterator[_Prometheus]:
    """Scrape the farm by ``configs/prometheus``, more often than that says."""
    shutil.copytree(_CONFIGS / "prometheus", tmp_path / "configs")
    config = tmp_path / "configs/prometheus.yml"
    text = config.read_text().replace("/var/lib/lazyfarm", str(farm.state_dir)).replace("15s", "1s")
    assert str(farm.state_dir / "run/prometheus-targets.json") in text
    config.write_text(text)
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


async def test_all_that_alerts_and_dashboard_name_is_there(farm, registry, prometheus):
    """After some work Prometheus has every metric that a rule or a panel names; each panel shows something.

    A rule that names what nobody exports would never fire, and nobody would notice.
    """
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
    read = prometheus.query('sum(ray_lazyfarm_read_bytes_total{source="registry"})')
    assert float(read[0]["value"][1]) >= sum(len(layer.data) for layer in made.layers)
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    assert {rule["name"] for rule in rules if rule["health"] != "ok"} == set()
    broken = named.replace("ray_lazyfarm_redis_failures_total", "ray_lazyfarm_redis_errors_total")
    assert _unknown(broken, names) == {"ray_lazyfarm_redis_errors_total"}
