"""What an actor's reply looks like, and its calls' spans, for both of their ends."""

from __future__ import annotations

from typing import Any

from cluster.tracing import Attribute
from cluster.wire import decode, decode_error

#: First byte of a reply: an error's payload follows, or the result's.
ERROR = b"\x01"
RESULT = b"\x00"


def rpc(actor: str, method: str) -> tuple[str, dict[str, Attribute]]:
    """Return the name and the attributes of a call's span, as OpenTelemetry has them for all remote calls."""
    name = f"{actor}/{method}"
    return name, {"rpc.system.name": "ray", "rpc.method": name}


def unwrap(kind: str, result_type: type[Any], reply: bytes) -> Any:
    """Return the result of a reply, or raise the error it carries.

    Raises:
        ClusterError: whatever the call raised there.
        MalformedPayloadError: the reply is truncated.
    """
    if reply[:1] == ERROR:
        raise decode_error(reply[1:])
    return decode(f"{kind}-result", result_type, reply[1:])
