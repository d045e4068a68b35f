"""Redaction: what must never be in a log, taken out by name and by form."""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping
from typing import Any

REDACTED = "[redacted]"

# Whole words of a key, so that `token_file`, `tokens_used` and `author` stay. `fence` tokens are no secrets,
# but are not worth an exception either.
_KEY = re.compile(
    r"(?:^|[_.-])(?:authorization|auth|passw(?:or)?d|passphrase|token|secret|credentials?|cookie|"
    r"api_?key|access_key|private_key|identity_token|x-registry-auth)$",
    re.IGNORECASE,
)
# Authorization headers, passwords within URLs, and tokens in query strings, wherever they stand in a text.
_FORMS = (
    (re.compile(r"\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1 {REDACTED}"),
    (re.compile(r"(\w+://[^\s:/@]*):[^\s/@]+@"), rf"\1:{REDACTED}@"),
    (
        re.compile(
            r"([?&](?:access_token|token|password|signature|x-amz-signature|x-amz-security-token|sig)=)[^&\s]+",
            re.IGNORECASE,
        ),
        rf"\1{REDACTED}",
    ),
)
_MAX_DEPTH = 8


def redact(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Take secrets out of a log line; a structlog processor, to stand right before the renderer."""
    for key, value in event.items():
        event[key] = _redacted(key, value, 0)
    return event


def redact_text(text: str) -> str:
    """Take authorization headers and passwords within URLs out of a text."""
    for form, replacement in _FORMS:
        text = form.sub(replacement, text)
    return text


def _redacted(key: str, value: Any, depth: int) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if _KEY.search(key) or depth >= _MAX_DEPTH:  # what can't be looked through is not shown
        return REDACTED
    if isinstance(value, Mapping):
        return {name: _redacted(str(name), item, depth + 1) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_redacted("", item, depth + 1) for item in value]
    return value if isinstance(value, int | float) else redact_text(str(value))
