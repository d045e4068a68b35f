"""Spans of single requests to registries, by OpenTelemetry's conventions for HTTP clients."""

from __future__ import annotations

from urllib.parse import urlsplit

from cluster import tracing
from cluster.tracing import Scope, SpanKind

STATUS = "http.response.status_code"


def request_span(method: str, url: str, *, registry: str) -> Scope:
    """Return a request's span. What a query string says is left out: redirects put signatures into it.

    No ``traceparent`` is sent: registries are none of ours.
    """
    parts = urlsplit(url)
    about = {
        "http.request.method": method,
        "url.full": f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}",
        "server.address": parts.hostname or "",
        "lazyfarm.registry": registry,
    }
    return tracing.span(method, about, kind=SpanKind.CLIENT)
