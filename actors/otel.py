"""Spans by OpenTelemetry's SDK, sent by OTLP over HTTP: the only module that knows either.

Never in anybody's way: spans wait in a bounded queue for a thread that sends them, those that find it full push the
oldest out, and a collector that is away costs these spans and one line of the log.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from actors.version import VERSION
from cluster.config import Config, TracingConfig
from cluster.redact import redact_text
from cluster.tracing import NODE, Attribute, Attributes, Span, SpanKind

log = structlog.get_logger()

#: Spans that wait at most, that are sent at once, and seconds between two sendings.
_QUEUE = 4096
_BATCH = 512
_EVERY_S = 1.0
#: Seconds that one sending may take, tries again among them, and that a process which ends waits for the last one.
_SEND_S = 5.0
_FLUSH_S = 1.0
_PATH = "/v1/traces"
_KINDS = {kind: trace.SpanKind[kind.name] for kind in SpanKind}
_PROPAGATOR = TraceContextTextMapPropagator()


def otel_tracer(config: Config, *, component: str, instance: str, node: str) -> OtelTracer:
    """Return a tracer whose spans go to the farm's collector.

    Raises:
        OSError: the file of headers can't be read. ValueError: it has a line that is no header.
    """
    settings = config.tracing
    exporter = OTLPSpanExporter(
        endpoint=settings.endpoint.rstrip("/") + _PATH, headers=_headers(settings), timeout=_SEND_S
    )
    about: dict[str, Attribute] = {
        "service.name": f"{settings.service_name}-{component}",
        "service.namespace": config.farm.name,
        "service.instance.id": instance,
        "service.version": VERSION,
        "process.pid": os.getpid(),
    }
    if node:
        about[NODE] = node
    provider = TracerProvider(
        sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
        resource=Resource.create(about),
        # It would wait for half a minute.
        shutdown_on_exit=False,
    )
    quiet = QuietExporter(exporter, settings.endpoint)
    processor = _QuietProcessor(
        quiet, max_queue_size=_QUEUE, max_export_batch_size=_BATCH, schedule_delay_millis=_EVERY_S * 1000
    )
    provider.add_span_processor(processor)
    tracer = OtelTracer(provider, quiet)
    atexit.register(tracer.flush)
    return tracer


class OtelTracer:
    """:class:`cluster.tracing.Tracer` over a provider of spans. The process's own, if it has one, is left alone."""

    def __init__(self, provider: TracerProvider, exporter: QuietExporter) -> None:
        self._provider = provider
        self._exporter = exporter
        #: The process ends, and its collector is away.
        self._is_over = False
        self._tracer = provider.get_tracer("lazyfarm", VERSION)

    def flush(self) -> None:
        """Send what waits, as this process ends: a collector that is away holds nobody up for long, nor twice."""
        if self._is_over:
            return
        flushing = threading.Thread(target=self.send, name="traces-flush", daemon=True)
        flushing.start()
        flushing.join(_FLUSH_S)
        if flushing.is_alive():
            self._is_over = True
            self._exporter.tell_away("it gave no answer in time", spans=0)

    def send(self) -> None:
        """Send what waits; returns when it is sent, or lost."""
        self._provider.force_flush()

    def start(self, name: str, *, parent: Span | str, kind: SpanKind, attributes: Attributes) -> Span:
        """Start a span; one that begins a trace goes on with the span that a driver's own code is in, if any."""
        above: Context | None = None
        if isinstance(parent, OtelSpan):
            above = trace.set_span_in_context(parent.span, Context())
        elif isinstance(parent, str) and parent:
            above = _PROPAGATOR.extract({"traceparent": parent}, context=Context())
        return OtelSpan(self._tracer.start_span(name, above, kind=_KINDS[kind], attributes=_safe(attributes)))


class OtelSpan:
    """:class:`cluster.tracing.Span` over OpenTelemetry's."""

    __slots__ = ("span",)

    def __init__(self, span: trace.Span) -> None:
        self.span = span

    @property
    def traceparent(self) -> str:
        """Return its name to other processes."""
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, trace.set_span_in_context(self.span, Context()))
        return carrier.get("traceparent", "")

    def put(self, attributes: Attributes) -> None:
        """Add attributes."""
        self.span.set_attributes(_safe(attributes))

    def link(self, traceparent: str) -> None:
        """Link to another span."""
        other = trace.get_current_span(_PROPAGATOR.extract({"traceparent": traceparent}, context=Context()))
        if other.get_span_context().is_valid:
            self.span.add_link(other.get_span_context())

    def end(self, error: BaseException | None = None) -> None:
        """End it, with the type and the message of an error, both as a log would show them."""
        if not self.span.is_recording():
            return
        if error is not None:
            name = type(error).__name__
            said = "cancelled" if isinstance(error, asyncio.CancelledError) else redact_text(str(error))
            self.span.set_attribute("error.type", name)
            # By hand: the SDK's own would add a traceback, with whatever values stand in its lines.
            self.span.add_event("exception", {"exception.type": name, "exception.message": said})
            self.span.set_status(trace.Status(trace.StatusCode.ERROR, said))
        self.span.end()


class QuietExporter(SpanExporter):
    """An exporter that tells once that its collector is away, and once that it is back."""

    def __init__(self, exporter: SpanExporter, endpoint: str) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._is_away = False
        self._hush = _Hush(type(exporter).__module__)

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans; whatever comes of it is told, not raised."""
        with self._hush.hushed() as said:
            try:
                result = self._exporter.export(spans)
            except Exception as exc:  # noqa: BLE001 - an exporter's bug is no farm's
                result = SpanExportResult.FAILURE
                said.append(f"{type(exc).__name__}: {exc}")
        if result is not SpanExportResult.SUCCESS:
            self.tell_away(redact_text(said[-1]) if said else "", spans=len(spans))
        elif self._is_away:
            self._is_away = False
            log.info("traces.back", endpoint=self._endpoint)
        return result

    def tell_away(self, reason: str, *, spans: int) -> None:
        """Say that the collector is away, unless that is said already."""
        if not self._is_away:
            self._is_away = True
            log.warning("traces.lost", endpoint=self._endpoint, spans=spans, error=reason)

    def shutdown(self) -> None:
        """Shut the exporter down."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Flush the exporter."""
        return self._exporter.force_flush(timeout_millis)


class _QuietProcessor(BatchSpanProcessor):
    """Says nothing of spans that it drops: that their collector is away is said already."""

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a span that has ended."""
        with _QUEUE_HUSH.hushed():
            super().on_end(span)


class _Hush:
    """Keeps a logger's lines of this thread from the log; those of others stand: a driver may trace for itself, too."""

    def __init__(self, logger: str) -> None:
        self._thread = threading.local()
        logging.getLogger(logger).addFilter(self._heard)

    @contextlib.contextmanager
    def hushed(self) -> Iterator[list[str]]:
        """Have what is said in the body put into the list that is lent."""
        said: list[str] = []
        self._thread.said = said
        try:
            yield said
        finally:
            self._thread.said = None

    def _heard(self, record: logging.LogRecord) -> bool:
        said: list[str] | None = getattr(self._thread, "said", None)
        if said is not None:
            said.append(record.getMessage())
        return said is None


_QUEUE_HUSH = _Hush("opentelemetry.sdk._shared_internal")


def _headers(settings: TracingConfig) -> dict[str, str]:
    if not settings.headers_file:
        return {}
    headers = {}
    for line in Path(settings.headers_file).read_text(encoding="utf-8").splitlines():
        name, colon, value = line.partition(":")
        if not line.strip():
            continue
        if not colon:
            raise ValueError(f"{settings.headers_file} has a line that is not NAME: VALUE")
        headers[name.strip()] = value.strip()
    return headers


def _safe(attributes: Attributes) -> dict[str, Attribute]:
    return {key: redact_text(value) if isinstance(value, str) else value for key, value in attributes.items()}
