"""The state of a Ray cluster in a Redis: told of while it is kept, and forgotten whole."""

from __future__ import annotations

import contextlib

import pytest

from storage.services.kept_cluster import KeptCluster
from tests.doubles.redis import free_port

pytestmark = pytest.mark.redis

NAMESPACE = "RAY_external_storage_namespace"


def test_a_cluster_comes_back_to_what_is_its_own(redis_any, tmp_path):
    """Its head is told the same until it is forgotten; another Redis, or none, has nothing of it."""
    kept, url = KeptCluster(tmp_path), f"redis://127.0.0.1:{redis_any.port}"
    assert kept.environment(url) == {}
    assert kept.begin("") == {}

    told = kept.begin(url)

    assert told["RAY_REDIS_ADDRESS"] == url
    assert KeptCluster(tmp_path).environment(url) == told
    assert kept.environment("redis://127.0.0.1:1") == kept.environment("") == {}
    kept.forget()
    assert kept.environment(url) == {}
    assert kept.begin(url)[NAMESPACE] != told[NAMESPACE]
    kept.forget()


def test_what_is_forgotten_leaves_no_key(redis_any, tmp_path):
    """However many there are; those of other clusters, and of farms, stay."""
    kept = KeptCluster(tmp_path)
    name = kept.begin(f"redis://127.0.0.1:{redis_any.port}/0")[NAMESPACE]
    with contextlib.closing(redis_any.link()) as link:
        others = ["RAYother@ACTOR", "lf:{x}:nodes"]
        for key in (*(f"RAY{name}@{number}" for number in range(3000)), *others):
            link.execute("SET", key, "1")

        kept.forget()

        assert link.execute("KEYS", f"RAY{name}*") == []
        assert link.execute("DEL", *others) == 2


def test_a_redis_that_is_gone_has_forgotten(tmp_path):
    """Ending the cluster doesn't depend on it."""
    kept, url = KeptCluster(tmp_path), f"redis://127.0.0.1:{free_port()}"
    assert kept.begin(url)
    kept.forget()
    assert kept.environment(url) == {}
