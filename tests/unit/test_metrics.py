"""Metrics: what their definitions, the code that tells them, the alerts and the pages must agree on."""

from __future__ import annotations

import ast
import asyncio
import json
import re
from pathlib import Path

import pytest

from actors.metrics import RayMetrics
from cluster import metrics
from cluster.metrics import METRICS, MOST_OPEN, OTHER, Counter, Gauge, Histogram, install
from cluster.topology import Kind

_ROOT = Path(__file__).resolve().parents[2]
_ALERTS = (_ROOT / "configs/prometheus/alerts.yml").read_text()
_DASHBOARD = json.loads((_ROOT / "configs/grafana/lazyfarm.json").read_text())
_OPERATIONS = (_ROOT / "docs/operations.md").read_text()
_CONSTANTS = {name: value for name, value in vars(metrics).items() if isinstance(value, metrics.Metric)}
_VERBS = {Counter: "add", Gauge: "set", Histogram: "observe"}
#: Labels that every series has, and those of buckets.
_ALWAYS = {"farm", "node", "actor", "le"}
_SELECTOR = re.compile(r"(ray_lazyfarm_\w+)(?:\{([^}]*)\})?")
_MATCHER = re.compile(r'(\w+)(=~|!=|=)"([^"]*)"')


class _Instrument:
    """Ray's side of a metric."""

    def __init__(self):
        self.told = {}

    def _record(self, value, tags):
        self.told[tuple(sorted(tags.items()))] = value


@pytest.fixture
def sink(monkeypatch):
    made = RayMetrics(farm="f", node="n0", actor="fetch-worker-n0")
    monkeypatch.setattr(made, "_instruments", {metric.name: _Instrument() for metric in METRICS})
    install(made)
    yield made
    install(None)


def _told(sink, metric):
    """Return what was told of a metric, by its own labels' values."""
    told = sink._instruments[metric.name].told
    return {tuple(dict(tags)[label] for label in metric.labels): value for tags, value in told.items()}


def test_names_end_in_their_unit_and_are_told_once():
    """Seconds and bytes end a name; a counter's `_total` is Prometheus's own; no two metrics share a name."""
    assert len({metric.name for metric in METRICS}) == len(METRICS) == len(_CONSTANTS)
    for metric in METRICS:
        assert re.fullmatch(r"lazyfarm(_[a-z0-9]+)+", metric.name), metric.name
        assert not metric.name.endswith("_total"), metric.name
        assert metric.help[0].isupper(), metric.name
        assert not metric.help.endswith("."), metric.name
        if isinstance(metric, Histogram):
            assert metric.name.endswith("_seconds")
            assert list(metric.buckets) == sorted(set(metric.buckets))
            assert metric.buckets[0] > 0
        else:
            units = {"seconds", "bytes"} & set(metric.name.split("_"))
            assert not units or metric.name.rpartition("_")[2] in units, metric.name


def _calls():
    """Return every call of a metric in the farm's code, as (where, metric, verb, labels)."""
    for package in ("cluster", "storage", "actors", "lazyfarm"):
        for path in sorted((_ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                match node:
                    case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr=verb)) if name in _CONSTANTS:
                        yield f"{path.name}:{node.lineno}", _CONSTANTS[name], verb, node.keywords


def _literals(value):
    """Return what an expression may come to, as far as it is written out."""
    match value:
        case ast.Constant(value=text):
            yield text
        case ast.IfExp(body=body, orelse=orelse):
            yield from _literals(body)
            yield from _literals(orelse)


def test_every_metric_is_told_with_its_labels():
    """Each metric is told somewhere, by its own verb, with its labels; values that are literals are known ones."""
    told = set()
    for where, metric, verb, keywords in _calls():
        told.add(metric.name)
        assert verb == _VERBS[type(metric)], where
        assert {keyword.arg for keyword in keywords} == set(metric.labels), where
        for keyword in keywords:
            known = metric.labels[keyword.arg]
            assert not known or set(_literals(keyword.value)) <= set(known), f"{where}: {keyword.arg} is one of {known}"
    assert told == {metric.name for metric in METRICS}


def test_nothing_is_told_where_no_sink_is():
    """Drivers and tests have no endpoint: telling does nothing."""
    install(None)
    metrics.FLIGHT_JOINS.add(outcome="owned")
    metrics.JOBS.set(1)


def test_counters_begin_at_zero_where_they_are_kept(sink):
    """A rate knows no series that begins at 1: who keeps a counter shows it as 0, and nobody else does."""
    sink.start(Kind.FETCH_WORKER)

    assert _told(sink, metrics.READ_BYTES) == {("registry",): 0, ("s3",): 0}
    assert _told(sink, metrics.FLIGHT_WRITES_REFUSED) == {(): 0}
    assert _told(sink, metrics.VERTICES) == {}
    metrics.READ_BYTES.add(5, source="s3")
    assert _told(sink, metrics.READ_BYTES) == {("registry",): 0, ("s3",): 5}


def test_a_label_that_is_open_has_few_values(sink):
    """Whoever pulls from a hundred registries makes no hundred series; those that were first keep theirs."""
    for number in range(100):
        metrics.REGISTRY_ANSWERS.add(registry=f"r{number}.example", answer="2xx")
    metrics.REGISTRY_ANSWERS.add(7, registry="r0.example", answer="2xx")

    told = _told(sink, metrics.REGISTRY_ANSWERS)
    assert len(told) == MOST_OPEN + 1
    assert told["r0.example", "2xx"] == 7
    assert (OTHER, "2xx") in told


async def test_a_gauge_is_told_again(sink, monkeypatch):
    """Ray forgets a gauge that it hears nothing of for 20 s: the last value of each is told again."""
    monkeypatch.setattr("actors.metrics._REFRESH_S", 0.0)
    metrics.OPS.set(3, state="running")
    metrics.OPS.set(2, state="running")
    told = asyncio.Queue()
    sink._instruments[metrics.OPS.name]._record = lambda value, tags: told.put_nowait((value, tags["state"]))

    telling = asyncio.create_task(sink.refresh_forever())

    assert await told.get() == await told.get() == (2, "running")
    telling.cancel()


def _expressions():
    alerts = re.findall(r"expr: (?:>-\n((?:\s{10,}.*\n)+)|(.*)\n)", _ALERTS)
    yield from (block or line for block, line in alerts)
    for panel in _DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))


def test_alerts_and_dashboard_select_by_labels_that_there_are():
    """A label that a metric lacks, or a value that it never has, selects nothing: no alert, an empty panel."""
    by_name = {}
    for metric in METRICS:
        ends = ("_bucket", "_sum", "_count") if isinstance(metric, Histogram) else ("",)
        by_name |= {metric.exported + end: metric for end in ends}
    count = 0
    for expression in _expressions():
        for name, selector in _SELECTOR.findall(expression):
            metric = by_name[name]
            for label, operator, value in _MATCHER.findall(selector):
                assert label in _ALWAYS | set(metric.labels), expression
                known = metric.labels.get(label)
                if known and operator != "!=":
                    assert set(value.split("|")) <= set(known), expression
            count += 1
    assert count > len(METRICS)


def test_the_manual_has_every_metric_and_every_alert():
    """docs/operations.md has each metric as it is defined, and a section for each alert, where the alert says."""
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        row = f"| `{metric.exported.removeprefix('ray_')}` | {labels} | {metric.help} |"
        assert row in _OPERATIONS, f"docs/operations.md lacks:\n{row}"

    alerts = re.findall(r"- alert: (\w+)", _ALERTS)
    headings = re.findall(r"^### (Lazyfarm\w+)$", _OPERATIONS, re.MULTILINE)
    assert headings == alerts
    assert re.findall(r"runbook: (\S+)", _ALERTS) == [f"docs/operations.md#{name.lower()}" for name in alerts]
    for name in alerts:
        section = _OPERATIONS.split(f"### {name}\n")[1].split("\n#")[0]
        assert "**Cause.**" in section, name
        assert "**Cure.**" in section, name
