"""Redis's errors become ours, here only."""

from __future__ import annotations

from hiredis import ReplyError

from cluster.errors import ClusterError, DeadlineExceededError, InternalError, UnavailableError

#: Error codes that say "not now" or "not here": the command was not executed.
_NOT_NOW = frozenset(
    {
        "BUSY",
        "CLUSTERDOWN",
        "LOADING",
        "MASTERDOWN",
        "MISCONF",
        "MOVED",
        "ASK",
        "NOAUTH",
        "NOPERM",
        "NOREPLICAS",
        "OOM",
        "READONLY",
        "TRYAGAIN",
        "WRONGPASS",
        "UNKILLABLE",
    }
)

#: How Redis 7 says NOPERM of a command within a script.
_FORBIDDEN_IN_SCRIPT = "The user executing the script can't"


def error_code(error: ReplyError) -> str:
    """Return the first word of an error reply, e.g. ``LOADING``."""
    return str(error).partition(" ")[0]


def translate_reply(error: ReplyError, what: str) -> ClusterError:
    """Return our error for an error reply of the server *what*.

    What the server can't do just now (it is loading, full, a replica, or wants a password) is
    UnavailableError; anything else means that we sent what makes no sense, which is our bug.
    """
    text = str(error)
    code = error_code(error)
    if code in _NOT_NOW or "max number of clients" in text or _FORBIDDEN_IN_SCRIPT in text:
        return UnavailableError(what, text)
    return InternalError(f"{what} refuses a command: {text}")


def translate_os(error: OSError | EOFError, what: str) -> UnavailableError:
    """Return our error for a connection that could not be made, broke or timed out."""
    if isinstance(error, TimeoutError):
        return DeadlineExceededError(what, "no answer in time")
    return UnavailableError(what, str(error) or type(error).__name__)
