"""What a registry's HTTP answer means, whichever client received it."""

from __future__ import annotations

import json
import ssl
import time
from email.utils import parsedate_to_datetime

from cluster.errors import (
    ClusterError,
    DeadlineExceededError,
    InsecureRegistryError,
    RateLimitedError,
    RedirectTargetError,
    UnavailableError,
    UntrustedCertificateError,
)
from cluster.metrics import REGISTRY_ANSWERS
from cluster.quota import Headers, Quota, parse_quotas

UNAUTHORIZED, FORBIDDEN, NOT_FOUND, TOO_MANY_REQUESTS = 401, 403, 404, 429
#: Counted each by itself, all others by their first digit.
_COUNTED = frozenset({UNAUTHORIZED, FORBIDDEN, NOT_FOUND, TOO_MANY_REQUESTS})
_SERVER_ERROR = 500
#: Request Timeout and Too Early: the same request may succeed.
_TRANSIENT = frozenset({408, 425})
#: Not Implemented and HTTP Version Not Supported: it never will.
_FINAL = frozenset({501, 505})
_DETAIL_CHARS = 200


def count_answer(registry: str, status: int | None) -> None:
    """Count the answer to one request; None: there was none, or it broke off."""
    if status is None:
        answer = "none"
    elif status in _COUNTED:
        answer = str(status)
    else:
        answer = f"{status // 100}xx"
    REGISTRY_ANSWERS.add(registry=registry, answer=answer)


def raise_if_transient(status: int, headers: Headers, *, what: str) -> None:
    """Raise what a status means that may be another at the next try; return for all others.

    Raises:
        RateLimitedError: 429, with what ``Retry-After`` asks for, and what the ``RateLimit`` headers say.
        UnavailableError: 5xx, 408 and 425; a 503 may carry ``Retry-After`` too.
    """
    retry_after = headers.get("Retry-After", "")
    if status == TOO_MANY_REQUESTS or (status == 503 and retry_after):  # noqa: PLR2004 -- Service Unavailable
        error = RateLimitedError(what, f"HTTP {status}", retry_after_s(retry_after))
        error.quotas = quotas(headers)
        raise error
    if status in _TRANSIENT or (status >= _SERVER_ERROR and status not in _FINAL):
        raise UnavailableError(what, f"HTTP {status}")


def retry_after_s(value: str, *, now_wall_s: float | None = None) -> float:
    """Return the seconds that a ``Retry-After`` header asks for; 0 where it can't be read.

    It is a number of seconds or an HTTP date; a date is counted from this machine's clock, as there is
    no other. Some registries send fractions.
    """
    text = value.strip()
    try:
        return max(0.0, min(float(text), 86400.0))
    except ValueError:
        pass
    try:
        until = parsedate_to_datetime(text).timestamp()
    except (ValueError, TypeError, OverflowError):
        return 0.0
    return max(0.0, min(until - (time.time() if now_wall_s is None else now_wall_s), 86400.0))


def quotas(headers: Headers) -> tuple[Quota, ...]:
    """Return what the ``RateLimit`` headers of an answer say is left."""
    return parse_quotas(headers, now_wall_s=time.time())


def error_detail(body: bytes) -> str:
    """Return the code and message of a distribution-spec error body, shortened, as printable text."""
    try:
        errors = json.loads(body)["errors"]
        text = "; ".join(f"{error.get('code', '')}: {error.get('message', '')}" for error in errors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "no reason given"
    return "".join(char if char.isprintable() else " " for char in text)[:_DETAIL_CHARS] or "no reason given"


def translate_network_error(exc: BaseException, *, host: str, what: str) -> ClusterError:
    """Return our error for what went wrong below HTTP. Addresses are left out: signed ones are secrets."""
    cause = _ssl_cause(exc)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return UntrustedCertificateError(host, cause.verify_message or "verification failed")
    if cause is not None and cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return InsecureRegistryError(host)
    if isinstance(exc, TimeoutError):
        return DeadlineExceededError(what, f"{host} did not answer in time")
    system = exc.strerror if isinstance(exc, OSError) else None
    return UnavailableError(what, f"{host}: {system or type(exc).__name__}")


def of_redirect_target(error: ClusterError) -> ClusterError:
    """Return what an error is where the registry sent us to another host: a failure says nothing of the registry."""
    if isinstance(error, UnavailableError) and not isinstance(error, RateLimitedError):
        return RedirectTargetError(error.what, error.reason)
    return error


def _ssl_cause(exc: BaseException) -> ssl.SSLError | None:
    seen: BaseException | None = exc
    while seen is not None:
        # aiohttp's own are SSLErrors without a reason and wrap the one that has it: ClientConnectorSSLError in
        # os_error, ClientConnectorCertificateError in certificate_error.
        wrapped = getattr(seen, "certificate_error", None) or getattr(seen, "os_error", None)
        if isinstance(wrapped, BaseException):
            seen = wrapped
        elif isinstance(seen, ssl.SSLError):
            return seen
        else:
            seen = seen.__cause__
    return None
