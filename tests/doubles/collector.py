"""A collector of traces: a real server that takes OTLP over HTTP, and keeps every span."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Told:
    """A span as it was received."""

    name: str
    service: str
    instance: str
    trace: str
    id: str
    parent: str
    kind: str
    attributes: dict[str, object]
    #: IDs of the spans that it links to.
    links: tuple[str, ...]
    #: What it says of its error; None: it has none.
    error: str | None
    start_ns: int
    end_ns: int


@dataclass
class Collector:
    """What was received."""

    port: int
    spans: list[Told] = field(default_factory=list)
    #: Of each request, lower-case.
    headers: list[dict[str, str]] = field(default_factory=list)
    #: It refuses whatever comes.
    is_down: bool = False

    @property
    def url(self) -> str:
        """Return what ``tracing.endpoint`` is to be."""
        return f"http://127.0.0.1:{self.port}"

    def wait(self, found: Callable[[list[Told]], object]) -> list[Told]:
        """Return all spans once *found* is true of them."""
        until_s = time.monotonic() + _PATIENCE_S
        while not found(spans := list(self.spans)):
            assert time.monotonic() < until_s, sorted((s.service, s.name) for s in spans)
            time.sleep(0.05)
        return spans


@contextmanager
def collecting(port: int = 0) -> Iterator[Collector]:
    """Collect spans for the body; *port* 0: any."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.path == "/v1/traces"
            if collector.is_down:
                self.send_error(503)
                return
            collector.headers.append({name.lower(): value for name, value in self.headers.items()})
            collector.spans.extend(_decoded(ExportTraceServiceRequest.FromString(body)))
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        collector = Collector(server.server_address[1])
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()


def _decoded(request: ExportTraceServiceRequest) -> Iterator[Told]:
    for resource in request.resource_spans:
        about = _plain(resource.resource.attributes)
        for scope in resource.scope_spans:
            for span in scope.spans:
                yield Told(
                    name=span.name,
                    service=about["service.name"],
                    instance=about["service.instance.id"],
                    trace=span.trace_id.hex(),
                    id=span.span_id.hex(),
                    parent=span.parent_span_id.hex(),
                    kind=ProtoSpan.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
                    attributes=_plain(span.attributes),
                    links=tuple(link.span_id.hex() for link in span.links),
                    error=span.status.message if span.status.code == Status.STATUS_CODE_ERROR else None,
                    start_ns=span.start_time_unix_nano,
                    end_ns=span.end_time_unix_nano,
                )


def _plain(attributes) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}
