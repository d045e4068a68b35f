"""Spans: that they cost nothing where nobody takes them, whose child each is, how they end, and what they never say."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import structlog

from actors import otel
from actors.handles import ActorHandle, _traced
from actors.otel import otel_tracer
from actors.replies import RESULT, unwrap
from actors.shell import answers
from actors.traces import start_traces
from cluster import tracing
from cluster.config import Config, TracingConfig
from cluster.errors import UnavailableError
from cluster.messages import GetRequest, SessionInfo
from cluster.solver import runner
from cluster.wire import decode, encode
from tests.doubles.collector import collecting

_ROOT = Path(__file__).resolve().parents[2]
_SPAN = re.compile(r'tracing\.(?:span|beginning|begins|continuing|start)\(\s*"([^"]+)"')
CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
UNSAMPLED = CALLER[:-1] + "0"


def _config(endpoint, **options):
    return Config(tracing=TracingConfig(endpoint=endpoint, **options))


@pytest.fixture(scope="module")
def collector():
    with collecting() as found:
        yield found


@contextlib.contextmanager
def _tracer(endpoint, *, node="", **options):
    """Make a tracer; its thread ends with the body, and tries nothing again after it."""
    made = otel_tracer(_config(endpoint, **options), component="driver", instance="test", node=node)
    try:
        yield made
    finally:
        made._exporter.shutdown()
        made._provider.shutdown()


@pytest.fixture(scope="module")
def tracer(collector):
    with _tracer(collector.url, node="n0") as made:
        yield made


@pytest.fixture
def traced(collector, tracer):
    """Trace this process; gives what is received once a span of a name is among it, by name."""
    collector.spans.clear()
    tracing.install(tracer)

    def told(last):
        tracer.send()
        return {span.name: span for span in collector.wait(lambda spans: any(s.name == last for s in spans))}

    yield told
    tracing.install(None)


def _request(session):
    return GetRequest(session=session, ref_id="r", handlers=(), lease_id="l")


def test_nothing_is_imported_and_no_span_made_where_no_endpoint_is_named():
    """What a farm without traces pays is a function call: drivers and actors alike never import OpenTelemetry."""
    code = (
        "import sys, lazyfarm.farm, lazyfarm.cli.parts, actors.remote, actors.boot, storage.fetching\n"
        "from actors.traces import start_driver_traces\n"
        "from cluster import tracing\n"
        "from cluster.config import Config\n"
        "start_driver_traces(Config())\n"
        "with tracing.beginning('x') as span: assert span is tracing.NOTHING\n"
        "print([name for name in sys.modules if name.startswith('opentelemetry.exporter.otlp')\n"
        "       or name.startswith('opentelemetry.sdk.trace') or name == 'actors.otel'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_every_span_is_documented():
    """docs/operations.md says what each name that the code gives to a span is."""
    told = (_ROOT / "docs/operations.md").read_text().partition("\n## Traces\n")[2].partition("\n## ")[0]
    names = set(runner._SPANS.values())
    for ring in ("cluster", "storage", "actors", "lazyfarm"):
        for path in (_ROOT / ring).rglob("*.py"):
            names |= set(_SPAN.findall(path.read_text()))
    assert len(names) > 20
    assert [name for name in sorted(names) if f"`{name}`" not in told] == []


def test_work_of_no_trace_makes_no_span(traced, collector):
    """Only what people begin is a trace: rounds in the background and polls are none."""
    with tracing.span("round") as span:
        assert span is tracing.NOTHING
    assert tracing.start("round", tracing.current()) is tracing.NOTHING
    with tracing.continuing("call", "") as span:
        assert span is tracing.NOTHING
    with tracing.beginning("mine"):
        pass

    assert list(traced("mine")) == ["mine"]


async def test_tasks_and_carried_threads_go_on_under_their_span(traced):
    """A task's spans are its creator's children, and so are those of a pool's thread that is told so."""

    def work():
        with tracing.span("thread"):
            pass

    async def task():
        with tracing.span("task"):
            pass

    with tracing.beginning("root"):
        await asyncio.create_task(task())
        with ThreadPoolExecutor(1) as pool:
            pool.submit(tracing.carried(work)).result()
            pool.submit(work).result()

    spans = traced("root")
    assert spans["root"].parent == ""
    assert spans["task"].parent == spans["thread"].parent == spans["root"].id
    assert len({span.trace for span in spans.values()}) == 1


def test_a_call_s_span_crosses_to_the_actor_in_its_session(traced):
    """The server's span is the client's child, over a payload; nobody's request is changed where nothing is traced."""

    class Shard:
        @answers("get", GetRequest)
        async def get(self, request):
            return request.session.traceparent

    untraced = _request(SessionInfo(session_id="s"))
    assert _traced(untraced, tracing.NOTHING) is untraced
    with tracing.beginning("client", kind=tracing.SpanKind.CLIENT) as span:
        payload = encode("get", _traced(untraced, span))
        reply = asyncio.run(Shard().get(payload))
        assert unwrap("get", str, reply) == span.traceparent

    spans = traced("client")
    assert spans["Shard/get"].parent == spans["client"].id
    assert (spans["Shard/get"].kind, spans["client"].kind) == ("server", "client")
    assert spans["Shard/get"].attributes == {"rpc.system.name": "ray", "rpc.method": "Shard/get"}


async def test_a_handle_tells_the_actor_of_its_own_span(traced, monkeypatch):
    """Each call is a span, under the current one, and what is sent names it."""
    sent = []

    async def call_raw(self, method, payload, *, timeout_s):
        sent.append(decode("get", GetRequest, payload).session.traceparent)
        return RESULT + encode("get-result", "done")

    monkeypatch.setattr(ActorHandle, "call_raw", call_raw)
    handle = ActorHandle("shard-0", farm="f")
    with tracing.beginning("root"):
        await handle.call("get", "get", _request(SessionInfo(session_id="s", traceparent=CALLER)), str, 1.0)

    spans = traced("root")
    call = spans["Actor/get"]
    assert call.parent == spans["root"].id
    assert [traceparent[:-3] for traceparent in sent] == [f"00-{call.trace}-{call.id}"]


def test_sessions_of_another_release_are_understood():
    """One that knows no traces says nothing of them, and one that knows more is read as far as it goes."""
    plain = {"session_id": "s"}
    assert decode("session", SessionInfo, encode("session", plain)).traceparent == ""
    later = {"session_id": "s", "traceparent": CALLER, "tracestate": "of-a-later-release"}
    assert decode("session", SessionInfo, encode("session", later)).traceparent == CALLER


def test_a_caller_s_trace_is_gone_on_with_and_its_sampling_holds(traced, collector):
    """TRACEPARENT names the parent, and whether anything is kept; one that can't be read begins a trace."""
    with tracing.beginning("kept", parent=CALLER), tracing.span("below"):
        pass
    with tracing.beginning("dropped", parent=UNSAMPLED) as span, tracing.span("dropped below"):
        assert span.traceparent.endswith("-00")
    with tracing.beginning("anew", parent="rubbish"):
        pass

    spans = traced("anew")
    assert (spans["kept"].trace, spans["kept"].parent) == (CALLER[3:35], CALLER[36:52])
    assert spans["below"].parent == spans["kept"].id
    assert spans["anew"].parent == ""
    assert spans["anew"].trace != CALLER[3:35]
    assert not any(name.startswith("dropped") for name in spans)


def test_errors_and_cancellations_end_a_span_without_a_secret(traced):
    """The status has the message as a log would show it; attributes likewise; a second end changes nothing."""
    url = "https://user:hunter2@registry.example.com/v2/?token=hunter2"
    error = UnavailableError("x", f"GET {url}: Authorization: Bearer hunter2hunter2")
    with pytest.raises(UnavailableError), tracing.beginning("failed", {"url.full": url}) as span:
        raise error
    span.put({"lazyfarm.source": url})
    span.end()
    with pytest.raises(asyncio.CancelledError), tracing.beginning("cancelled"):
        raise asyncio.CancelledError

    spans = traced("cancelled")
    assert spans["failed"].attributes["error.type"] == "UnavailableError"
    assert "registry.example.com" in spans["failed"].error
    assert "hunter2" not in repr(spans)
    assert spans["cancelled"].error == "cancelled"
    assert spans["cancelled"].attributes["error.type"] == "CancelledError"


def test_a_link_names_another_span(traced):
    """What was done under another span says so; what can't be read as one is no link."""
    with tracing.beginning("joined") as span:
        span.link(CALLER)
        span.link("")
        span.link("rubbish")

    assert traced("joined")["joined"].links == (CALLER[36:52],)


def test_headers_come_from_their_file(tmp_path, collector):
    """Each request has them; a line that is none turns this process's traces off, and says so in one line."""
    (tmp_path / "headers").write_text("X-Token: hunter2\n\n")
    with _tracer(collector.url, headers_file=str(tmp_path / "headers")) as made:
        made.start("with headers", parent="", kind=tracing.SpanKind.INTERNAL, attributes={}).end()
        made.send()
        collector.wait(lambda spans: any(span.name == "with headers" for span in spans))
    assert any(headers.get("x-token") == "hunter2" for headers in collector.headers)

    (tmp_path / "headers").write_text("hunter2\n")
    with structlog.testing.capture_logs() as lines:
        start_traces(_config(collector.url, headers_file=str(tmp_path / "headers")), component="driver", instance="x")
    assert [line["event"] for line in lines] == ["traces.off"]
    assert "hunter2" not in json.dumps(lines)
    assert not tracing.is_installed()


def test_a_collector_that_is_away_is_told_of_once_and_holds_nobody_up(caplog, monkeypatch):
    """Spans are dropped, with one line for all of them, and one when it is back; nobody waits."""
    monkeypatch.setattr(otel, "_SEND_S", 0.2)
    with collecting() as found:
        port = found.port
    caplog.set_level(logging.DEBUG)

    def tell(count):
        for number in range(count):
            made.start(f"span {number}", parent="", kind=tracing.SpanKind.INTERNAL, attributes={}).end()

    with _tracer(f"http://127.0.0.1:{port}") as made, structlog.testing.capture_logs() as lines:
        tell(6000)  # more than the queue takes
        for _ in range(3):
            made.send()
            tell(1)
        assert [line["event"] for line in lines] == ["traces.lost"]
        assert [record for record in caplog.records if record.name.startswith("opentelemetry")] == []

        with collecting(port) as found:
            tell(1)
            made.send()
            found.wait(lambda spans: spans)
        assert [line["event"] for line in lines] == ["traces.lost", "traces.back"]


def test_a_process_that_ends_waits_a_moment_once(monkeypatch):
    """A collector that takes no connection costs the end of a process one short wait, and one line."""
    monkeypatch.setattr(otel, "_FLUSH_S", 0.05)
    monkeypatch.setattr(otel, "_SEND_S", 0.5)
    with (
        socket.create_server(("127.0.0.1", 0), backlog=1) as silent,
        _tracer(f"http://127.0.0.1:{silent.getsockname()[1]}") as made,
    ):
        made.start("last", parent="", kind=tracing.SpanKind.INTERNAL, attributes={}).end()
        with structlog.testing.capture_logs() as lines:
            made.flush()
            assert [line["event"] for line in lines] == ["traces.lost"]
            made.flush()
        assert len(lines) == 1
