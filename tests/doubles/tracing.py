"""A tracer that keeps its spans."""

from __future__ import annotations

import itertools

from cluster import tracing


class RecordedSpan:
    """One span."""

    def __init__(self, name, parent, attributes, number):
        self.name = name
        self.parent = parent
        self.attributes = dict(attributes)
        self.links = []
        self.error = None
        self.ends = 0
        self.traceparent = f"00-{1:032x}-{number:016x}-01"

    @property
    def path(self):
        """Return the names of the spans above it, and its own."""
        above = self.parent.path if isinstance(self.parent, RecordedSpan) else ()
        return (*above, self.name)

    def put(self, attributes):
        self.attributes.update(attributes)

    def link(self, traceparent):
        if traceparent:
            self.links.append(traceparent)

    def end(self, error=None):
        if not self.ends:
            self.error = error
        self.ends += 1


class RecordingTracer:
    """Installed for one test."""

    def __init__(self, monkeypatch):
        self.spans = []
        self._numbers = itertools.count(1)
        monkeypatch.setattr(tracing, "_tracer", self)

    def start(self, name, *, parent, kind, attributes):
        self.spans.append(RecordedSpan(name, parent, attributes, next(self._numbers)))
        return self.spans[-1]

    def flush(self):
        pass
