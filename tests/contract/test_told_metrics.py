"""What adapters tell of themselves while they work, on real servers."""

from __future__ import annotations

import contextlib
import secrets

import pytest

from actors.metrics import show_circuits
from cluster import metrics
from cluster.config import S3Config
from cluster.digest import digest_of
from cluster.errors import CircuitOpenError, LeaseLostError, StaleFenceError, UnavailableError
from cluster.flight.values import UploadState
from cluster.lease import LeaseId, blob_resource
from cluster.metrics import MOST_OPEN, OTHER
from cluster.quota import Budget, Quota, RequestKind
from cluster.ref import BlobRecord
from storage.blobs import S3ContentStore
from storage.circuits import Circuits
from storage.registry.answers import count_answer
from tests.doubles.stores import BREAKER, RedisFarm

DIGEST = digest_of(b"layer")
KEY = blob_resource(DIGEST)
TTL_S = 6.0


@pytest.fixture
async def redis_stores(redis_any):
    farm = RedisFarm(redis_any.farm_config, redis_any.config)
    yield farm.stores()
    await farm.close()


async def test_a_take_over_is_told_by_who_takes_over(redis_stores, told):
    """Who owns after another's lapse tells so, and whether it resumes; what the old owner writes is told as refused."""
    flights = redis_stores.flights
    old = (await flights.join(KEY, worker="n0", token="0", ttl_s=TTL_S)).fence
    await flights.begin_upload(old, UploadState(key="blobs/x/1", upload_id="u-1", part_bytes=8 << 20))
    await flights.join(KEY, worker="n1", token="1", ttl_s=TTL_S)
    assert ("flight_take_overs", "resumed") not in told
    redis_stores.pass_time(TTL_S + 0.1)

    new = (await flights.join(KEY, worker="n1", token="2", ttl_s=TTL_S)).fence
    with pytest.raises(StaleFenceError):
        await flights.record_part(old, 1, '"one"')
    await flights.commit(new, BlobRecord(digest=DIGEST, key="blobs/x/1", size_bytes=5, etag='"e"', fence=new.number))
    await flights.join(KEY, worker="n2", token="3", ttl_s=TTL_S)

    assert {key: value for key, value in told.items() if not key[0].startswith("redis")} == {
        ("flight_acquire_seconds",): 4,
        ("flight_joins", "owned"): 2,
        ("flight_joins", "joined"): 1,
        ("flight_joins", "present"): 1,
        ("flight_take_overs", "resumed"): 1,
        ("flight_writes_refused",): 1,
        ("flight_ends", "committed"): 1,
        ("committed_bytes",): 5,
    }
    assert told["redis_seconds",] >= 7
    assert ("redis_failures",) not in told


async def test_a_lease_that_is_gone_is_told(redis_stores, told):
    """A renewal that comes too late is told once; one in time isn't."""
    lease = LeaseId(secrets.token_hex(4))
    await redis_stores.leases.create(lease, ttl_s=TTL_S)
    await redis_stores.leases.renew(lease, ttl_s=TTL_S)
    assert ("leases_lost",) not in told
    redis_stores.pass_time(TTL_S + 0.1)

    with pytest.raises(LeaseLostError):
        await redis_stores.leases.renew(lease, ttl_s=TTL_S)

    assert told["leases_lost",] == 1


def test_a_call_to_s3_that_fails_is_told_as_failed(told, tmp_path):
    """Where nobody answers, the call is told once, with its operation, however often it was tried."""
    credentials = tmp_path / "credentials"
    credentials.write_text("access_key_id = a\nsecret_access_key = b\n")
    store = S3ContentStore(
        S3Config(endpoint="http://127.0.0.1:9", bucket="b", credentials_file=str(credentials), attempts=2)
    )

    with pytest.raises(UnavailableError):
        store.put("key", b"data")

    assert told == {("s3_seconds", "PutObject", "failed"): 1}
    store.close()


def test_answers_are_told_by_what_they_ask_for(told):
    """What is done about an answer differs for 401, 403, 404 and 429; of all others the class is enough."""
    for status in (200, 206, 307, 401, 403, 404, 405, 416, 429, 500, 503, None):
        count_answer("r", status)

    answers = {key[2]: count for key, count in told.items()}
    assert answers == {
        "2xx": 2, "3xx": 1, "401": 1, "403": 1, "404": 1, "4xx": 2, "429": 1, "5xx": 2, "none": 1,
    }  # fmt: skip
    assert set(answers) == set(metrics.REGISTRY_ANSWERS.labels["answer"])


async def test_a_registry_that_is_given_up_is_told(redis_farm, told):
    """Once by whose request was one too many; by the supervisor for as long as it is, and that it is no more."""
    limiter, circuits, host = redis_farm.stores().limiter, Circuits(redis_farm.links[0], redis_farm.keys), "r.example"
    for _ in range(BREAKER.failures + 1):
        with contextlib.suppress(CircuitOpenError):
            async with limiter.slot(host, deadline_s=5.0) as slot:
                await limiter.failed(slot, "no answer")
        redis_farm.pass_time(2.0)
    assert told["registry_circuit_opened",] == 1
    named = await show_circuits(circuits, frozenset())
    assert (named, told["registry_circuit_open", host], told["registry_circuit_open", OTHER]) == ({host}, 1, 0)
    many = frozenset(f"r{number}.example" for number in range(MOST_OPEN - 1))
    assert await show_circuits(circuits, many) == many
    assert told["registry_circuit_open", OTHER] == 1
    redis_farm.pass_time(7200.0)  # by then the host is forgotten
    assert await show_circuits(circuits, named) == {host}
    assert told["registry_circuit_open", host] == told["registry_circuit_open", OTHER] == 0


async def test_the_wait_for_what_a_registry_allows_is_told_by_its_kind(redis_farm, told):
    """Of requests of a budget of which little is left; others wait for other things."""
    limiter, host = redis_farm.stores().limiter, "r.example"
    budget = Budget(kind=RequestKind.MANIFEST)
    for _ in range(2):
        async with limiter.slot(host, deadline_s=5.0, budget=budget) as slot:
            await limiter.quoted(slot, [Quota(remaining=10, limit=100, reset_s=2.0, window_s=2.0)])
    async with limiter.slot(host, deadline_s=5.0):
        pass
    assert told["registry_quota_remaining", host, "manifest"] == 10
    assert 0 < told["registry_quota_wait_seconds", "manifest"] < 5
    assert ("registry_quota_wait_seconds", "blob") not in told
