"""The farm's gateway: a process of its own, which joins the cluster and lets drivers and browsers in from outside."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from cluster.config import GatewayConfig
from storage.services.http_service import HttpService
from storage.services.state_dir import StateDir

_ANSWER_S = 5.0
#: Of an answer that is looked at: more than ours has.
_MOST_BYTES = 100


class GatewayService(HttpService[GatewayConfig]):
    """The gateway's process."""

    name = "gateway"
    module = "lazyfarm.gateway"
    stop_s = 10.0  # connections are closed, and Ray's cluster is left

    def _scheme(self, config: GatewayConfig) -> str:
        return "https" if config.cert_file else "http"

    def _answers(self, host: str, port: int, scheme: str) -> bool:
        import ssl  # noqa: PLC0415 - as in the base
        from http.client import HTTPConnection, HTTPSConnection  # noqa: PLC0415 - likewise

        from cluster.gateway import HEALTH_PATH  # noqa: PLC0415 - likewise

        if scheme == "https":
            # Nothing is told to who answers, and what it says proves who it is, under whatever name.
            trust = ssl.create_default_context()
            trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
            connection: HTTPConnection = HTTPSConnection(host, port, timeout=_ANSWER_S, context=trust)
        else:
            connection = HTTPConnection(host, port, timeout=_ANSWER_S)
        try:
            connection.request("GET", HEALTH_PATH)
            said = connection.getresponse().read(_MOST_BYTES)
        finally:
            connection.close()
        return hmac.compare_digest(said, sign(self._state.farm_id(), self.process.pid or 0))


def sign(farm_id: str, pid: int) -> bytes:
    """Return what the gateway that is process *pid* says of itself to anybody; who knows the farm knows it by that."""
    return hmac.new(farm_id.encode(), b"gateway %d" % pid, hashlib.sha256).hexdigest().encode()


def gateway_address(state_dir: Path) -> str:
    """Return where a farm's gateway was started by ``up``; "" where none was."""
    return GatewayService(StateDir(state_dir)).url
