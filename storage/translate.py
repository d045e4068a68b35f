"""Redis's errors become ours, here only."""

from __future__ import annotations

import re

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

#: What else says so, by no code of its own. The second is how Redis 7 says NOPERM of a command within a script.
_NOT_NOW_EITHER = ("max number of clients", "The user executing the script can't", "cannot be used with replica")

#: Codes of those that another server may execute, or the same one later: which one takes writes has changed, or is
#: about to. ASK is one of them: it says that a slot is on its way to another node, where a script would find half of
#: its keys.
_ELSEWHERE = frozenset({"ASK", "CLUSTERDOWN", "LOADING", "MASTERDOWN", "MOVED", "READONLY", "TRYAGAIN"})
#: How Redis 6.2 tells of a command that failed within a script.
_IN_SCRIPT = re.compile(r"ERR Error running script .*: -([A-Z]+) ")


def is_elsewhere(reply: object) -> bool:
    """Tell whether a reply says that nothing was executed, and that it is worth asking for the primary anew."""
    return isinstance(reply, ReplyError) and error_code(reply) in _ELSEWHERE


def error_code(error: ReplyError) -> str:
    """Return the code of an error reply, e.g. ``LOADING``."""
    text = str(error)
    within = _IN_SCRIPT.match(text)
    return within[1] if within else text.partition(" ")[0]


def translate_reply(error: ReplyError, what: str) -> ClusterError:
    """Return our error for an error reply of the server *what*.

    What the server can't do just now (it is loading, full, a replica, or wants a password) is
    UnavailableError; anything else means that we sent what makes no sense, which is our bug.
    """
    text = str(error)
    code = error_code(error)
    if code in _NOT_NOW or any(part in text for part in _NOT_NOW_EITHER):
        return UnavailableError(what, text)
    return InternalError(f"{what} refuses a command: {text}")


def translate_os(error: OSError | EOFError, what: str) -> UnavailableError:
    """Return our error for a connection that could not be made, broke or timed out."""
    if isinstance(error, TimeoutError):
        return DeadlineExceededError(what, "no answer in time")
    return UnavailableError(what, str(error) or type(error).__name__)
