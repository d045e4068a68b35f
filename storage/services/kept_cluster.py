"""Where the state of a Ray cluster is kept that its head may leave and come back to: in a Redis, under a name."""

from __future__ import annotations

import secrets
from contextlib import closing, suppress
from pathlib import Path

from cluster.config import RedisConfig
from cluster.errors import ClusterError
from cluster.redis_url import parse_redis_url
from storage.connect import connect_sync
from storage.services.state_dir import write_atomic

_TIMEOUT_S = 5.0
#: How Ray begins the names of its keys; from 2.9 on.
_PREFIX = "RAY"


class KeptCluster:
    """The one cluster of a farm, recorded in ``run/ray-cluster``. Callers hold the lock ``ray``."""

    def __init__(self, run: Path) -> None:
        self._record = run / "ray-cluster"

    def begin(self, url: str) -> dict[str, str]:
        """Record a new cluster that Redis *url* keeps; return what its head needs to know. Nothing for ""."""
        if url:
            write_atomic(self._record, f"{url} {secrets.token_hex(8)}")
        return self.environment(url)

    def environment(self, url: str) -> dict[str, str]:
        """Return what the head of the recorded cluster needs to know; empty where Redis *url* keeps none."""
        kept, name = self._read()
        if not url or kept != url:
            return {}
        said = parse_redis_url(url)
        scheme = "rediss" if said.is_tls else "redis"
        return {"RAY_REDIS_ADDRESS": f"{scheme}://{said.places[0]}", "RAY_external_storage_namespace": name}

    def forget(self) -> None:
        """Forget the recorded cluster, and what is kept of it; a Redis that is gone has forgotten it."""
        url, name = self._read()
        if not url:
            return
        with suppress(ClusterError), closing(connect_sync(RedisConfig(url=url, timeout_s=_TIMEOUT_S))) as link:
            cursor = b"0"
            while True:
                cursor, keys = link.execute("SCAN", cursor, "MATCH", f"{_PREFIX}{name}@*", "COUNT", 1000)
                if keys:
                    link.execute("DEL", *keys)
                if cursor == b"0":
                    break
        self._record.unlink(missing_ok=True)

    def _read(self) -> tuple[str, str]:
        try:
            url, _, name = self._record.read_text().partition(" ")
        except FileNotFoundError:
            return "", ""
        return url, name
