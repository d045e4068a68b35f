"""The content store's contract, on memory, Swift and Ceph; and how the S3 one meets faults."""

from __future__ import annotations

import itertools
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from cluster.config import S3Config
from cluster.errors import BlobNotFoundError, ConfigError, StoreFullError, UnavailableError, UnsafeStoreError
from cluster.ports import ContentStore
from storage.blobs import S3ContentStore, _ViewBody
from storage.memory_blobs import MemoryContentStore
from storage.s3_credentials import FileProvider
from tests.doubles.s3_faults import LOST, Answer, Hang, LoseAnswer, ResetAfter, TruncateAfter

MIB = 1024**2
PART_BYTES = 5 * MIB  # the least S3 takes for any part but the last


@pytest.fixture(
    params=[
        "memory",
        pytest.param("swift", marks=pytest.mark.s3),
        pytest.param("ceph", marks=[pytest.mark.s3, pytest.mark.slow]),
    ]
)
def store(request):
    if request.param == "memory":
        yield MemoryContentStore()
        return
    s3 = S3ContentStore(request.getfixturevalue(f"{request.param}_s3"))
    yield s3
    s3.close()


@pytest.fixture
def faulty(s3_proxy):
    """A store on Swift through the fault proxy."""
    s3 = S3ContentStore(s3_proxy.config)
    yield s3
    s3.close()


@pytest.fixture
def key():
    return f"blobs/{uuid4().hex}/{uuid4().hex}"


def bytes_of(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data


def read(store: ContentStore, key: str, offset: int = 0, length: int | None = None, step: int = 256 * 1024) -> bytes:
    read_bytes, buffer = bytearray(), memoryview(bytearray(step))
    with store.open(key, offset, length) as stream:
        while count := stream.readinto(buffer):
            read_bytes += buffer[:count]
    return bytes(read_bytes)


def upload(store: ContentStore, key: str, parts: list[bytes]) -> None:
    upload_id = store.begin_upload(key)
    done = [store.upload_part(key, upload_id, number, memoryview(data)) for number, data in enumerate(parts, 1)]
    store.complete_upload(key, upload_id, done)


# -- whole objects ---------------------------------------------------------------------------------


def test_a_copy_is_of_the_object_that_was_meant(store, key):
    """Within the bucket; not of one that has taken its place."""
    info = store.put(key, b"bytes")
    store.copy(info, f"quarantine/{key}")
    assert read(store, f"quarantine/{key}") == b"bytes"
    store.put(key, b"others")
    for gone in (info, replace(info, key=f"{key}x")):
        with pytest.raises(BlobNotFoundError):
            store.copy(gone, f"quarantine/{key}")


def test_a_list_goes_on_after_a_key(store, key):
    """Sorted; what comes before and the key itself are left out."""
    for name in ("c", "a", "b"):
        store.put(f"{key}/{name}", b"")
    assert [info.key for info in store.objects(key)] == [f"{key}/{name}" for name in "abc"]
    assert [info.key for info in store.objects(key, f"{key}/a")] == [f"{key}/b", f"{key}/c"]


@pytest.mark.parametrize("size", [0, 1, 65_537, MIB])
def test_what_was_put_is_read_back(store, key, size):
    """An object is read as it was written, also an empty one, and head tells its size."""
    data = bytes_of(size)

    info = store.put(key, data)

    assert (info.key, info.size_bytes) == (key, size)
    assert store.head(key) == info
    assert read(store, key) == data


def test_a_view_of_a_buffer_is_put_without_its_surroundings(store, key):
    """Only the view's bytes are written, and the buffer may be reused afterwards."""
    buffer = bytearray(bytes_of(3000))
    expected = bytes(buffer[1000:2000])

    store.put(key, memoryview(buffer)[1000:2000])
    buffer[:] = bytes(3000)

    assert read(store, key) == expected


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (0, None), (10, None), (999, 1), (100, 500), (900, 500), (500, 0), (1000, None)]
)
def test_a_range_is_exactly_what_was_asked_for(store, key, offset, length):
    """A range gives its bytes; what reaches over the end gives what is there."""
    data = bytes_of(1000)
    store.put(key, data)

    assert read(store, key, offset, length) == data[offset : None if length is None else offset + length]


def test_small_reads_give_the_same_bytes(store, key):
    """A stream may be read in pieces of any size."""
    data = bytes_of(300_000)
    store.put(key, data)

    assert read(store, key, step=777) == data


def test_a_stream_may_be_left_half_read(store, key):
    """Closing early harms neither the store nor the next reader."""
    data = bytes_of(2 * MIB)
    store.put(key, data)

    for _ in range(20):  # more than there are connections
        with store.open(key) as stream:
            assert stream.readinto(memoryview(bytearray(100))) > 0

    assert read(store, key) == data


def test_what_is_not_there_is_told_apart(store, key):
    """Opening a missing object is BlobNotFoundError, looking it up gives None, deleting it does nothing."""
    with pytest.raises(BlobNotFoundError):
        store.open(key)
    assert store.head(key) is None
    store.delete(key)


def test_a_deleted_object_is_gone(store, key):
    """After delete there is nothing to open, and it is not listed."""
    store.put(key, b"x")

    store.delete(key)

    assert store.head(key) is None
    assert list(store.objects(key)) == []


def test_listing_gives_what_is_under_the_prefix(store, key):
    """Objects under a prefix are listed with their sizes, others are not, unfinished uploads neither."""
    store.put(f"{key}/a", b"1")
    store.put(f"{key}/b", b"22")
    store.put(f"{key}-other", b"333")
    upload_id = store.begin_upload(f"{key}/c")

    listed = {info.key: info.size_bytes for info in store.objects(f"{key}/")}

    assert listed == {f"{key}/a": 1, f"{key}/b": 2}
    store.abort_upload(f"{key}/c", upload_id)


# -- multi-part uploads ------------------------------------------------------------------------------


def test_parts_out_of_order_make_the_object_in_order(store, key):
    """Parts are numbered: the order they arrive in doesn't matter."""
    parts = [bytes_of(PART_BYTES, 1), bytes_of(PART_BYTES, 2), bytes_of(1234, 3)]
    upload_id = store.begin_upload(key)

    done = [store.upload_part(key, upload_id, number, memoryview(parts[number - 1])) for number in (3, 1, 2)]
    info = store.complete_upload(key, upload_id, done)

    assert info.size_bytes == sum(map(len, parts))
    assert read(store, key) == b"".join(parts)
    assert read(store, key, PART_BYTES - 5, 10) == parts[0][-5:] + parts[1][:5]


def test_nothing_is_there_until_an_upload_is_complete(store, key):
    """An unfinished upload is no object."""
    upload_id = store.begin_upload(key)
    store.upload_part(key, upload_id, 1, memoryview(b"data"))

    assert store.head(key) is None
    store.abort_upload(key, upload_id)
    assert store.head(key) is None


def test_an_upload_is_resumed_by_another_client(store, key):
    """Who takes over finds the parts that arrived, adds the rest and completes."""
    parts = [bytes_of(PART_BYTES, 1), bytes_of(PART_BYTES, 2), bytes_of(99, 3)]
    upload_id = store.begin_upload(key)
    store.upload_part(key, upload_id, 1, memoryview(parts[0]))
    store.upload_part(key, upload_id, 3, memoryview(parts[2]))
    other = store if isinstance(store, MemoryContentStore) else S3ContentStore(store._config)

    found = other.list_parts(key, upload_id)
    assert [(part.number, part.size_bytes) for part in found] == [(1, PART_BYTES), (3, 99)]
    found.append(other.upload_part(key, upload_id, 2, memoryview(parts[1])))
    other.complete_upload(key, upload_id, found)

    assert read(other, key) == b"".join(parts)
    if other is not store:
        other.close()


def test_a_part_may_be_uploaded_again(store, key):
    """The last upload of a part counts."""
    upload_id = store.begin_upload(key)
    store.upload_part(key, upload_id, 1, memoryview(b"first"))
    part = store.upload_part(key, upload_id, 1, memoryview(b"again"))

    store.complete_upload(key, upload_id, [part])

    assert read(store, key) == b"again"


def test_many_parts_are_all_listed(store, key):
    """Parts are listed to the last, over as many pages as it takes."""
    upload_id = store.begin_upload(key)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: store.upload_part(key, upload_id, number, memoryview(b"x")), range(1, 31)))

    assert [part.number for part in store.list_parts(key, upload_id)] == list(range(1, 31))
    store.abort_upload(key, upload_id)


def test_completing_twice_is_completing_once(store, key):
    """Who didn't hear the answer asks again, and gets it."""
    upload_id = store.begin_upload(key)
    part = store.upload_part(key, upload_id, 1, memoryview(b"data"))

    first = store.complete_upload(key, upload_id, [part])
    second = store.complete_upload(key, upload_id, [part])

    assert (first.key, first.size_bytes) == (second.key, second.size_bytes) == (key, 4)


def test_an_aborted_upload_takes_no_part(store, key):
    """After an abort, parts, listing and completion say that there is no such upload; abort itself says nothing."""
    upload_id = store.begin_upload(key)
    part = store.upload_part(key, upload_id, 1, memoryview(b"data"))
    store.abort_upload(key, upload_id)

    store.abort_upload(key, upload_id)
    with pytest.raises(BlobNotFoundError):
        store.upload_part(key, upload_id, 2, memoryview(b"more"))
    with pytest.raises(BlobNotFoundError):
        store.list_parts(key, upload_id)
    with pytest.raises(BlobNotFoundError):
        store.complete_upload(key, upload_id, [part])


def test_completing_a_gone_upload_where_another_size_is_there_fails(store, key):
    """Idempotence is for the same object: another size is not taken for it."""
    upload_id = store.begin_upload(key)
    part = store.upload_part(key, upload_id, 1, memoryview(b"data"))
    store.abort_upload(key, upload_id)
    store.put(key, b"something else")

    with pytest.raises(BlobNotFoundError):
        store.complete_upload(key, upload_id, [part])


def test_completing_with_a_part_that_never_came_fails(store, key):
    """A part that the store doesn't have is BlobNotFoundError: the upload can't be resumed as it was believed."""
    upload_id = store.begin_upload(key)
    part = store.upload_part(key, upload_id, 1, memoryview(b"data"))

    with pytest.raises(BlobNotFoundError):
        store.complete_upload(key, upload_id, [part, replace(part, number=2)])
    store.abort_upload(key, upload_id)


def test_unfinished_uploads_are_listed(store, key):
    """A sweeper finds what was begun and never completed, and only that."""
    upload(store, f"{key}/done", [b"x"])
    upload_id = store.begin_upload(f"{key}/begun")

    assert store.list_uploads(key) == [(f"{key}/begun", upload_id)]
    store.abort_upload(f"{key}/begun", upload_id)
    assert store.list_uploads(key) == []


def test_concurrent_writers_use_keys_of_their_own(store, key):
    """Uploads of the same bytes under different keys, at once, don't meet."""
    contents = {f"{key}/{n}": [bytes_of(PART_BYTES, n), bytes_of(100, n + 50)] for n in range(4)}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda item: upload(store, *item), contents.items()))

    for name, parts in contents.items():
        assert read(store, name) == b"".join(parts)


# -- S3 alone ---------------------------------------------------------------------------------------


@pytest.mark.s3
def test_an_error_of_the_server_is_tried_again(faulty, s3_proxy, key):
    """A 503 or two are not the caller's affair, and a retried part is whole."""
    data = bytes_of(PART_BYTES)
    s3_proxy.plan(Answer(503, "SlowDown"), method="PUT", times=2)
    s3_proxy.plan(Answer(500, "InternalError"), method="GET", times=2)
    upload_id = faulty.begin_upload(key)

    part = faulty.upload_part(key, upload_id, 1, memoryview(data))
    faulty.complete_upload(key, upload_id, [part])

    assert read(faulty, key) == data
    assert s3_proxy.count("PUT", "partNumber") == 3


@pytest.mark.s3
def test_a_server_that_stays_broken_is_unavailable(faulty, s3_proxy, key):
    """After the last try the error says what was being done, and may be tried again."""
    s3_proxy.plan(Answer(503, "SlowDown"), method="PUT", times=99)

    with pytest.raises(UnavailableError, match=f"write {key}: HTTP 503 SlowDown") as caught:
        faulty.put(key, b"x")

    assert caught.value.retryable
    assert s3_proxy.count("PUT") == 3


@pytest.mark.s3
def test_an_answer_that_is_lost_is_asked_for_again(faulty, s3_proxy, key):
    """Completion whose answer was lost has happened, and the retry finds that out."""
    upload_id = faulty.begin_upload(key)
    part = faulty.upload_part(key, upload_id, 1, memoryview(b"data"))
    s3_proxy.plan(LoseAnswer(), method="POST", target="uploadId")

    info = faulty.complete_upload(key, upload_id, [part])

    assert info.size_bytes == 4
    assert read(faulty, key) == b"data"


@pytest.mark.s3
def test_a_part_that_could_not_be_looked_up_is_looked_up_again(faulty, s3_proxy, key):
    """Swift then calls the request to complete an upload invalid, which for any other server is the end of it."""
    upload_id = faulty.begin_upload(key)
    part = faulty.upload_part(key, upload_id, 1, memoryview(b"x"))
    s3_proxy.plan(Answer(400, "InvalidRequest"), method="POST", target="uploadId", times=2)
    assert faulty.complete_upload(key, upload_id, [part]).size_bytes == 1
    again = faulty.begin_upload(key)
    part = faulty.upload_part(key, again, 1, memoryview(b"x"))
    s3_proxy.plan(Answer(400, "InvalidRequest"), method="POST", target="uploadId", times=99)
    with pytest.raises(UnsafeStoreError, match="InvalidRequest"):
        faulty.complete_upload(f"{key}-2", again, [part])


@pytest.mark.s3
@pytest.mark.parametrize("fault", [ResetAfter(MIB + 17), TruncateAfter(MIB + 17)])
def test_a_read_that_breaks_is_resumed_where_it_broke(faulty, s3_proxy, key, fault):
    """After a break only what is missing is asked for, and the reader sees nothing of it."""
    data = bytes_of(3 * MIB)
    faulty.put(key, data)
    s3_proxy.plan(fault, method="GET", times=2)

    assert read(faulty, key) == data
    assert s3_proxy.count("GET") == 3
    if isinstance(fault, TruncateAfter):  # a reset also drops what was on its way
        assert s3_proxy.sent_bytes == len(data)


@pytest.mark.s3
def test_a_read_that_keeps_breaking_ends(faulty, s3_proxy, key):
    """Breaks without progress between them are counted, and the last is the caller's."""
    faulty.put(key, bytes_of(MIB))
    s3_proxy.plan(ResetAfter(10), method="GET", times=99)

    with pytest.raises(UnavailableError):
        read(faulty, key)

    assert s3_proxy.count("GET") == 3


@pytest.mark.s3
def test_a_lost_object_is_told_while_it_is_read(faulty, s3_proxy, key):
    """An object that goes away under a reader is BlobNotFoundError, not a short read."""
    faulty.put(key, bytes_of(2 * MIB))
    s3_proxy.plan(ResetAfter(MIB), method="GET")
    s3_proxy.plan(LOST, method="GET", times=99)

    with pytest.raises(BlobNotFoundError):
        read(faulty, key)


@pytest.mark.s3
def test_a_replaced_object_is_not_spliced(faulty, s3_proxy, s3_config, key):
    """A reader that resumes never gets another object's bytes after the first one's."""
    faulty.put(key, bytes_of(2 * MIB, 1))
    s3_proxy.plan(ResetAfter(MIB), method="GET")
    stream = faulty.open(key)
    faulty.put(key, bytes_of(2 * MIB, 2))

    buffer = memoryview(bytearray(4 * MIB))
    with stream, pytest.raises(BlobNotFoundError):
        sum(iter(lambda: stream.readinto(buffer), 0))


@pytest.mark.s3
def test_a_server_that_hangs_is_given_up(s3_proxy, key):
    """Silence ends after ``timeout_s``, under UnavailableError."""
    store = S3ContentStore(replace(s3_proxy.config, timeout_s=0.3, attempts=1))
    s3_proxy.plan(Hang(), method="PUT", times=99)

    with pytest.raises(UnavailableError):
        store.put(key, b"x")
    store.close()


@pytest.mark.s3
def test_nobody_listens(s3_config, key):
    """A server that isn't there is unavailable, and the message names it."""
    store = S3ContentStore(replace(s3_config, endpoint="http://127.0.0.1:9", attempts=1))

    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:9"):
        store.head(key)
    store.close()


@pytest.mark.s3
@pytest.mark.parametrize("server", ["swift", pytest.param("ceph", marks=pytest.mark.slow)])
@pytest.mark.parametrize("wrong", ["secret", "key"])
def test_wrong_credentials_are_called_so(request, tmp_path, key, server, wrong):
    """Credentials that S3 refuses are no "try again", and the secret is not repeated."""
    config = request.getfixturevalue(f"{server}_s3")
    good = dict(line.split(" = ") for line in Path(config.credentials_file).read_text().splitlines())
    if wrong == "secret":
        good["secret_access_key"] = "wrong-secret"
    else:
        good["access_key_id"] = "nobody:atall"
    bad = tmp_path / "credentials"
    bad.write_text("".join(f"{name} = {value}\n" for name, value in good.items()))
    store = S3ContentStore(replace(config, credentials_file=str(bad)))

    for act in (lambda: store.put(key, b"x"), lambda: store.head(key), lambda: store.open(key)):
        with pytest.raises(UnsafeStoreError) as caught:
            act()
        assert "wrong-secret" not in str(caught.value)
        assert "credentials_file" in caught.value.hint
    store.close()


def test_a_credentials_file_without_a_secret_is_a_fault_of_the_configuration(tmp_path, key):
    """What is missing in the file is named, and nothing of what is there is repeated."""
    path = tmp_path / "credentials"
    path.write_text("access_key_id = AKIAEXAMPLE\n")
    store = S3ContentStore(S3Config(endpoint="http://127.0.0.1:9", credentials_file=str(path)))

    with pytest.raises(ConfigError, match="secret_access_key") as caught:
        store.head(key)
    assert "AKIAEXAMPLE" not in str(caught.value)


@pytest.mark.s3
def test_keys_that_are_exchanged_are_used_at_once(s3_proxy, s3_config, tmp_path, key):
    """Expired keys are called so; new ones in the file are used without a restart, half written ones are not."""
    good = Path(s3_config.credentials_file).read_text()
    file = tmp_path / "credentials"
    file.write_text(good)
    store = S3ContentStore(replace(s3_proxy.config, credentials_file=str(file)))
    store.put(key, b"x")
    s3_proxy.plan(Answer(400, "ExpiredToken"), method="GET")
    with pytest.raises(UnsafeStoreError, match="ExpiredToken") as caught:
        read(store, key)
    assert "without a restart" in caught.value.hint

    file.write_text(good.splitlines()[0])
    assert read(store, key) == b"x"
    file.write_text("access_key_id = other\nsecret_access_key = other\n")
    with pytest.raises(UnsafeStoreError):
        read(store, key)
    whole = tmp_path / "new"
    whole.write_text(good)
    whole.replace(file)
    assert read(store, key) == b"x"
    store.close()


def test_temporary_keys_have_a_token(tmp_path):
    """It is sent with them, and goes when others take their place."""
    file = tmp_path / "credentials"
    file.write_text("access_key_id = id\nsecret_access_key = secret\nsession_token = token==\n")
    credentials = FileProvider(str(file)).load()
    assert credentials.get_frozen_credentials()[:3] == ("id", "secret", "token==")
    file.write_text("access_key_id = other\nsecret_access_key = more\n")
    assert credentials.get_frozen_credentials()[:3] == ("other", "more", None)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("status", "code"), [(507, "InsufficientStorage"), (403, "QuotaExceeded"), (400, "XMinioAdminBucketQuotaExceeded")]
)
def test_a_full_bucket_is_called_so(faulty, s3_proxy, key, status, code):
    """It is not tried again, and says what to do; what is there can be read."""
    faulty.put(key, b"x")
    s3_proxy.plan(Answer(status, code), method="PUT", times=99)
    puts = s3_proxy.count("PUT")

    with pytest.raises(StoreFullError, match=f"write {key}/2: HTTP {status} {code}") as caught:
        faulty.put(f"{key}/2", b"x")

    assert not caught.value.retryable
    assert "make room" in caught.value.hint
    assert s3_proxy.count("PUT") == puts + 1
    assert read(faulty, key) == b"x"


@pytest.mark.s3
@pytest.mark.parametrize("server", ["swift", pytest.param("ceph", marks=pytest.mark.slow)])
def test_the_bucket_is_made_once(request, server):
    """A missing bucket is called so by name; making it is idempotent, also by several at once; check passes then."""
    config = replace(request.getfixturevalue(f"{server}_s3"), bucket=f"made-{uuid4().hex}")
    store = S3ContentStore(config)
    with pytest.raises(UnsafeStoreError, match="no such bucket"):
        store.put("k", b"x")

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: store.ensure_bucket(), range(4)))

    assert True in made
    assert store.ensure_bucket() is False
    assert store.check().bucket == config.bucket
    assert list(store.objects("")) == []
    store.close()


@pytest.mark.s3
def test_threads_share_one_client(s3_config):
    """Many threads at once make one client between them, and each gets its own bytes."""
    store = S3ContentStore(s3_config)
    start = threading.Barrier(8)

    def write_and_read(n: int) -> bool:
        start.wait(10.0)
        data = bytes_of(200_000, n)
        store.put(f"k{n}", data)
        return read(store, f"k{n}") == data

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(write_and_read, range(8)))
    store.close()


def test_a_body_is_the_callers_buffer_itself():
    """What is sent is a view of the buffer, not a copy, and it can be rewound for a retry."""
    buffer = bytearray(b"0123456789")
    body = _ViewBody(memoryview(buffer))

    first = body.read(4)
    assert isinstance(first, memoryview)
    assert first.obj is buffer
    assert body.read() == b""
    body.seek(0)
    assert bytes(itertools.chain.from_iterable(iter(lambda: body.read(4), b""))) == b"0123456789"


@pytest.mark.s3
@pytest.mark.slow
def test_the_farms_key_is_good_for_its_bucket_alone(ceph_owner, ceph_s3):
    """`configs/s3-policy.json` opens all that a farm does, no other bucket, and none of the bucket's own rules."""
    owner, farm = S3ContentStore(replace(ceph_owner, bucket=f"other-{uuid4().hex}")), S3ContentStore(ceph_s3)
    owner.ensure_bucket()
    assert not farm.ensure_bucket()
    assert farm.check().bucket == ceph_s3.bucket
    others = farm.in_bucket(owner.bucket)
    for use in (others.check, others.ensure_bucket, lambda: list(others.objects("")), lambda: others.put("k", b"1")):
        with pytest.raises(UnsafeStoreError):
            use()
    client = farm._client
    for rule in (client.delete_bucket, client.get_bucket_policy, client.delete_bucket_policy):
        with pytest.raises(client.exceptions.ClientError, match="AccessDenied"):
            rule(Bucket=ceph_s3.bucket)
    owner.close()
    farm.close()
