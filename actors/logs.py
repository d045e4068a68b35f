"""Logs: JSON lines, one canonical line an operation; in words on a terminal.

Lines of the standard library's loggers (Ray's, boto3's) go the same way. Secrets are taken out last
(:mod:`cluster.redact`), so that no processor and no library can put one back.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import structlog
from structlog.typing import Processor

from cluster.redact import redact

_SHARED: tuple[Processor, ...] = (
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
)
# Above `info`, these tell of nothing that our own lines don't; below, they would drown them.
_CHATTY = ("boto3", "botocore", "urllib3", "s3transfer", "asyncio", "aiohttp")


def configure_logs(*, level: str, stream: TextIO, is_pretty: bool | None = None, **context: object) -> None:
    """Set the process's logs up; a later call replaces an earlier one.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        stream: Where lines go: text, flushed line by line.
        is_pretty: Words and colours instead of JSON; None: where *stream* is a terminal.
        context: Put into every line of this thread and its tasks (actor, node, command).
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    pretty = stream.isatty() if is_pretty is None else is_pretty
    finish: list[Processor] = (
        [redact, structlog.dev.ConsoleRenderer(colors=stream.isatty())]
        if pretty
        else [structlog.processors.format_exc_info, redact, structlog.processors.JSONRenderer(serializer=_as_json)]
    )
    structlog.configure(
        processors=[*_SHARED, structlog.processors.StackInfoRenderer(), *finish],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.WriteLoggerFactory(file=stream),
        cache_logger_on_first_use=False,  # module-level loggers made before this call must follow it
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(**context)
    _route_standard_library(threshold, stream, finish)


@contextmanager
def logs_to(path: Path, *, level: str, **context: object) -> Iterator[None]:
    """Append the process's logs to *path* as JSON lines, and put back what was set up before.

    The file takes lines of several processes: each is one write, far below the size that could be torn.
    """
    before, handlers, threshold = structlog.get_config(), logging.getLogger().handlers[:], logging.getLogger().level
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", buffering=1) as stream:
        configure_logs(level=level, stream=stream, is_pretty=False, **context)
        try:
            yield
        finally:
            structlog.contextvars.clear_contextvars()
            structlog.configure(**before)
            logging.getLogger().handlers[:] = handlers
            logging.getLogger().setLevel(threshold)


def _route_standard_library(threshold: int, stream: TextIO, finish: list[Processor]) -> None:
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[
                *_SHARED,
                structlog.stdlib.add_logger_name,
                structlog.stdlib.PositionalArgumentsFormatter(),
            ],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *finish],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(threshold)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(max(threshold, logging.WARNING))


def _as_json(event: object, **_options: object) -> str:
    return json.dumps(event, default=str, ensure_ascii=False)
