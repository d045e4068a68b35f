"""The byte path: every byte once where nothing fails, the right bytes or a typed error where something does."""

import random
import threading
from contextlib import suppress
from itertools import count

import pytest

from cluster.descriptor import Descriptor
from cluster.digest import digest_of
from cluster.errors import (
    AccessDeniedError,
    BlobNotFoundError,
    ClusterError,
    DigestMismatchError,
    RangeRefusedError,
    RateLimitedError,
    SessionGoneError,
    SizeMismatchError,
    StaleFenceError,
    UnavailableError,
)
from cluster.flight.values import UploadState
from storage import transfer as transfer_module
from storage.memory_blobs import MemoryContentStore
from storage.transfer import BlobTransfer, BufferPool, TransferLimits, TransferStoppedError
from tests.doubles.fetch import FakeJournal, FakeSource, Fault, MemoryStaging

PART = 1000
RESET = UnavailableError("r.example", "connection reset")
DATA = random.Random(1).randbytes(10 * PART + 123)  # noqa: S311 - test data
PARTS = 11


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Parts and chunks of a size for tests; S3's least part is 5 MiB."""
    monkeypatch.setattr(transfer_module, "part_size", lambda _size, configured: configured)
    monkeypatch.setattr(transfer_module, "_CHUNK", 300)
    monkeypatch.setattr(transfer_module, "_REPORT_EVERY_S", 0.0)


class Pauses(threading.Event):
    """A stop event that notes the pauses instead of making them."""

    def __init__(self):
        super().__init__()
        self.paused_s = []

    def wait(self, timeout=None):
        self.paused_s.append(timeout)
        return self.is_set()


class Bench:
    """A transfer and everything around it."""

    def __init__(self, *sources, data=DATA, parallel=False, resume=None, ranges=4, buffers=6, attempts=3, budget_s=100):
        self.data = data
        self.sources = sources
        self.store = MemoryContentStore()
        self.journal = FakeJournal()
        self.stagings = []
        self.keys = [f"blobs/x/{n}" for n in range(1, 9)]
        self._keys = iter(self.keys)
        self.pool = BufferPool(buffers, PART)
        self.limits = TransferLimits(
            part_bytes=PART,
            parallel_from_bytes=0 if parallel else 10**9,
            ranges=ranges,
            attempts=attempts,
            retry_budget_s=budget_s,
        )
        self.resume = resume

    def make(self, **more):
        self.transfer = BlobTransfer(
            Descriptor(media_type="x", digest=digest_of(self.data), size_bytes=len(self.data)),
            self.sources,
            store=self.store,
            pool=self.pool,
            limits=self.limits,
            journal=self.journal,
            new_key=lambda: next(self._keys),
            new_staging=self._new_staging,
            resume=self.resume,
            **more,
        )
        self.pauses = self.transfer._stop = Pauses()
        return self.transfer

    def run(self):
        done = self.make().run()
        assert self.stored(done.object.key) == self.data
        assert bytes(done.staging.data) == self.data
        assert done.staging.frontier == len(self.data)
        assert not done.staging.is_discarded
        assert done.staging is self.stagings[-1]
        assert all(s.is_discarded and s.error is not None for s in self.stagings[:-1])
        self.assert_no_buffer_is_out()
        return done

    def fails(self, error_type):
        with pytest.raises(error_type) as caught:
            self.make().run()
        assert all(s.is_discarded and isinstance(s.error, ClusterError) for s in self.stagings)
        self.assert_no_buffer_is_out()
        return caught.value

    def leave_upload(self, parts, *, data=None, key="blobs/x/left"):
        """Leave an upload as an owner that died would; return it."""
        data = self.data if data is None else data
        upload_id = self.store.begin_upload(key)
        for number in parts:
            self.store.upload_part(key, upload_id, number, memoryview(data[(number - 1) * PART : number * PART]))
        self.resume = UploadState(key=key, upload_id=upload_id, part_bytes=PART)
        return self.resume

    def stored(self, key):
        with self.store.open(key) as stream:
            buffer = bytearray(len(self.data) + 1)
            return bytes(buffer[: stream.readinto(memoryview(buffer))])

    def objects(self):
        return [info.key for info in self.store.objects("")]

    def assert_no_buffer_is_out(self):
        assert self.pool.used_bytes == 0, "a buffer was not given back"

    def _new_staging(self):
        self.stagings.append(MemoryStaging(len(self.data)))
        return self.stagings[-1]


# -- no faults -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 299, 300, 301, PART - 1, PART])
def test_a_blob_of_one_part_is_one_get_and_one_put(size):
    """No multi-part upload, no range: the fewest requests there can be."""
    bench = Bench(FakeSource(DATA[:size]), data=DATA[:size], parallel=True)
    done = bench.run()
    assert bench.sources[0].opened == [(0, None)]
    assert done.bytes_fetched == size
    assert bench.journal.upload is None
    assert bench.store.list_uploads("") == []


def test_an_empty_blob_is_not_asked_for():
    """What has no bytes needs no source."""
    bench = Bench(FakeSource(b""), data=b"")
    assert bench.run().bytes_fetched == 0
    assert bench.sources[0].opened == []


@pytest.mark.parametrize("size", [PART + 1, 2 * PART, len(DATA)])
def test_a_small_layer_is_read_with_one_request(size):
    """Below the size for parallel ranges, one response fills all parts; each byte is fetched once."""
    bench = Bench(FakeSource(DATA[:size]), data=DATA[:size])
    done = bench.run()
    assert bench.sources[0].opened == [(0, None)]
    assert done.bytes_fetched == bench.sources[0].served_bytes == size
    assert bench.journal.reports[-1] == (size, size)
    assert len(bench.journal.parts) == -(-size // PART)
    assert bench.store.list_uploads("") == []


def test_parallel_ranges_fetch_each_byte_once():
    """Several readers share a big layer part by part."""
    bench = Bench(FakeSource(DATA), parallel=True)
    done = bench.run()
    assert done.bytes_fetched == bench.sources[0].served_bytes == len(DATA)
    assert sorted(offset for offset, _length in bench.sources[0].opened) == [n * PART for n in range(PARTS)]


def test_ranges_that_come_out_of_order_are_hashed_in_order():
    """The first part comes last: what came before it waits in the staging file, and the hash is right."""
    others = threading.Semaphore(0)

    def on_read(offset, _count):
        if offset == 0:
            for _ in range(3):
                assert others.acquire(timeout=10)
        elif offset % PART == PART - 100:
            others.release()

    source = FakeSource(DATA)
    source.on_read = on_read
    bench = Bench(source, parallel=True)
    frontiers = []
    made = bench._new_staging

    def new_staging():
        staging = made()
        advance = staging.advance
        staging.advance = lambda frontier: (frontiers.append(frontier), advance(frontier))
        return staging

    bench._new_staging = new_staging
    bench.run()
    assert frontiers == sorted(frontiers)


def test_a_hundred_random_schedules_hash_right():
    """Whatever order the readers' chunks come in, the hash is that of the bytes in order."""
    rng = random.Random(7)  # noqa: S311 - test data
    for _ in range(100):
        size = rng.randrange(1, 8 * PART)
        bench = Bench(FakeSource(DATA[:size]), data=DATA[:size], parallel=True, ranges=rng.randrange(1, 6), buffers=3)
        assert bench.run().bytes_fetched == size


def test_the_pool_never_hands_out_more_than_its_count():
    """Three transfers at once on a pool of three buffers: bounded memory, and nobody waits for ever."""
    lock = threading.Lock()
    out = most = 0

    class CountingPool(BufferPool):
        def acquire(self, needed_bytes, stop):
            nonlocal out, most
            buffer = super().acquire(needed_bytes, stop)
            with lock:
                out += 1
                most = max(most, out)
            return buffer

        def release(self, buffer):
            nonlocal out
            with lock:
                out -= 1
            super().release(buffer)

    pool = CountingPool(3, PART)
    benches = [Bench(FakeSource(DATA), parallel=True) for _ in range(3)]
    threads = []
    for bench in benches:
        bench.pool = pool
        threads.append(threading.Thread(target=bench.make().run))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert out == 0
    assert 1 <= most <= 3
    assert all(bench.stored("blobs/x/1") == DATA for bench in benches)


# -- resuming --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [[1, 2, 3], [2, 5, 7], list(range(1, 11)), list(range(1, 12))])
def test_a_resumed_upload_fetches_only_what_is_missing(left):
    """Parts that S3 has are not fetched again, and what they came to is read back before it is returned."""
    bench = Bench(FakeSource(DATA))
    upload = bench.leave_upload(left)
    done = bench.run()
    assert done.object.key == upload.key
    assert done.bytes_fetched == len(DATA) - sum(len(DATA[(n - 1) * PART : n * PART]) for n in left)
    assert bench.journal.dropped == 0


def test_a_part_of_another_length_is_fetched_again():
    """A part whose upload was cut short is none."""
    bench = Bench(FakeSource(DATA))
    upload = bench.leave_upload([1, 2])
    bench.store.upload_part(upload.key, upload.upload_id, 2, memoryview(b"short"))
    assert bench.run().bytes_fetched == len(DATA) - PART


def test_a_resumed_upload_without_parts_is_hashed_as_it_streams():
    """Nothing was uploaded: nothing need be read back."""
    bench = Bench(FakeSource(DATA))
    bench.leave_upload([])
    bench.store.open, open_ = None, bench.store.open
    done = bench.make().run()
    bench.store.open = open_
    assert bench.stored(done.object.key) == DATA


def test_an_upload_that_is_gone_is_begun_anew():
    """S3 has dropped it: everything is fetched again, under a new key, and the record is replaced."""
    bench = Bench(FakeSource(DATA))
    upload = bench.leave_upload([1, 2])
    bench.store.abort_upload(upload.key, upload.upload_id)
    done = bench.run()
    assert done.object.key == "blobs/x/1"
    assert done.bytes_fetched == len(DATA)
    assert bench.journal.dropped == 1
    assert bench.journal.upload.key == "blobs/x/1"


def test_an_upload_that_was_completed_is_not_fetched_again():
    """Its owner died between completing it and committing it: the object is verified and used."""
    bench = Bench(FakeSource(DATA))
    upload = bench.leave_upload(range(1, 12))
    bench.store.complete_upload(upload.key, upload.upload_id, bench.store.list_parts(upload.key, upload.upload_id))
    done = bench.run()
    assert done.object.key == upload.key
    assert done.bytes_fetched == 0
    assert bench.sources[0].opened == []


@pytest.mark.parametrize("is_completed", [False, True])
def test_a_resumed_upload_of_wrong_bytes_is_dropped(is_completed):
    """It hashes wrong: nothing of it stays, no source is blamed, and the blob comes afresh under a new key."""
    bench = Bench(FakeSource(DATA))
    upload = bench.leave_upload(range(1, 12), data=DATA[:PART] + bytes(PART) + DATA[2 * PART :])
    if is_completed:
        bench.store.complete_upload(upload.key, upload.upload_id, bench.store.list_parts(upload.key, upload.upload_id))
    done = bench.run()
    assert done.object.key == "blobs/x/1"
    assert done.bytes_fetched == len(DATA)
    assert bench.objects() == ["blobs/x/1"]
    assert bench.store.list_uploads("") == []


def test_an_upload_that_vanishes_in_the_middle_is_begun_anew():
    """Somebody swept the upload while its parts came: start over, once."""
    bench = Bench(FakeSource(DATA))

    def on_read(offset, _count):
        if offset >= 5 * PART and len(bench.stagings) == 1:
            for key, upload_id in bench.store.list_uploads(""):
                bench.store.abort_upload(key, upload_id)

    bench.sources[0].on_read = on_read
    assert bench.run().object.key == "blobs/x/2"


@pytest.mark.parametrize("vanish_at", ["part", "completion"])
def test_a_store_that_loses_every_upload_is_given_up(vanish_at):
    """It says NoSuchUpload again and again: as many tries as are configured, not as many as the hour has room for."""
    bench = Bench(FakeSource(DATA), attempts=3)
    method = {"part": "upload_part", "completion": "complete_upload"}[vanish_at]

    def gone(key, *_args):
        raise BlobNotFoundError(key, "the content store")

    setattr(bench.store, method, gone)
    error = bench.fails(UnavailableError)
    assert "is gone from the content store, after 3 of 3 attempts" in str(error)
    assert len(bench.stagings) == bench.journal.dropped == 3
    assert bench.store.list_uploads("") == []


def test_a_resumed_upload_that_is_gone_is_not_charged():
    """What another owner's upload came to costs this one no try, be there only one."""
    bench = Bench(FakeSource(DATA), attempts=1)
    upload = bench.leave_upload([1, 2])
    bench.store.abort_upload(upload.key, upload.upload_id)
    assert bench.run().object.key == "blobs/x/1"


def test_a_blob_that_is_nowhere_is_told_with_every_place_that_was_tried():
    """A foreign layer whose own address is down: that the repository never had it is only half of the story."""
    down = FakeSource(DATA, "https://elsewhere.example/blob", faults=[Fault(at_open=RESET)] * 3)
    absent = FakeSource(DATA, faults=[Fault(at_open=BlobNotFoundError(digest_of(DATA), "r.example/app"))])
    told = str(Bench(down, absent).fails(BlobNotFoundError))
    assert "is not in r.example/app (also tried: https://elsewhere.example/blob: " in told
    assert "connection reset" in told


# -- where the bytes came from --------------------------------------------------------------------------------


def test_bytes_of_one_repository_are_said_to_be_its():
    """A mirror counts as the repository that it stands for; a source that gave nothing doesn't count."""
    refusing = FakeSource(DATA, "evil.example/bait", faults=[Fault(at_open=BlobNotFoundError("x", "evil.example"))])
    mirror = FakeSource(DATA, "mirror.example/app", faults=[Fault(after=2500, then=AccessDeniedError("a", "m", "403"))])
    mirror.origin = "r.example/app"
    assert Bench(refusing, mirror, FakeSource(DATA, "r.example/app")).run().origin == "r.example/app"


def test_bytes_of_several_repositories_are_nobodys():
    """Neither has shown that it has all of the blob."""
    first = FakeSource(DATA, "evil.example/bait", faults=[Fault(after=2500, then=AccessDeniedError("a", "m", "403"))])
    assert Bench(first, FakeSource(DATA, "r.example/app")).run().origin == ""


@pytest.mark.parametrize("is_completed", [False, True])
def test_bytes_that_an_earlier_owner_fetched_are_nobodys(is_completed):
    """This owner's sources may never have had them."""
    bench = Bench(FakeSource(DATA, "evil.example/bait"))
    upload = bench.leave_upload(range(1, 12) if is_completed else [1, 2])
    if is_completed:
        bench.store.complete_upload(upload.key, upload.upload_id, bench.store.list_parts(upload.key, upload.upload_id))
    assert bench.run().origin == ""


# -- sources that fail -----------------------------------------------------------------------------------


@pytest.mark.parametrize("then", [RESET, None])
@pytest.mark.parametrize("after", [0, 1, 2500, len(DATA) - 1])
def test_a_response_that_breaks_is_resumed_where_it_broke(then, after):
    """A reset or a short body: the rest comes by a range, no byte twice."""
    source = FakeSource(DATA, faults=[Fault(after=after, then=then)])
    bench = Bench(source)
    assert bench.run().bytes_fetched == len(DATA)
    assert source.opened[1:] == [(after, len(DATA) - after if after else None)]
    assert len(bench.pauses.paused_s) == 1


def test_a_small_blob_is_resumed_too():
    """The one-part path survives a reset as well."""
    source = FakeSource(DATA[:500], faults=[Fault(after=200, then=RESET)])
    assert Bench(source, data=DATA[:500]).run().bytes_fetched == 500


def test_parallel_readers_survive_resets():
    """Each reader resumes its own part."""
    faults = [Fault(after=n * 100, then=RESET) for n in range(1, 6)]
    assert Bench(FakeSource(DATA, faults=faults), parallel=True, attempts=9).run().bytes_fetched == len(DATA)


def test_retry_after_is_obeyed():
    """429: nobody asks before the registry says so."""
    source = FakeSource(DATA, faults=[Fault(at_open=RateLimitedError("r.example", "429", 7.5))])
    bench = Bench(source)
    bench.run()
    [pause_s] = bench.pauses.paused_s
    assert pause_s >= 7.5


def test_a_retry_after_beyond_the_budget_means_the_next_source():
    """Waiting in vain helps nobody."""
    limited = FakeSource(DATA, faults=[Fault(at_open=RateLimitedError("r.example", "429", 1000))])
    other = FakeSource(DATA, "mirror.example/app")
    bench = Bench(limited, other)
    assert bench.run().source == "mirror.example/app"
    assert bench.pauses.paused_s == []


@pytest.mark.parametrize(
    "error",
    [BlobNotFoundError("sha256:x", "r"), AccessDeniedError("app", "r", "403"), SessionGoneError("s1")],
    ids=lambda error: type(error).__name__,
)
def test_a_definite_error_goes_to_the_next_source_at_once(error):
    """404, 403, a session that is gone: this source is of no use, and isn't asked twice."""
    first = FakeSource(DATA, faults=[Fault(at_open=error)] * 9)
    second = FakeSource(DATA, "mirror.example/app")
    bench = Bench(first, second)
    assert bench.run().source == "mirror.example/app"
    assert len(first.opened) == 1
    assert bench.pauses.paused_s == []


def test_the_next_source_goes_on_where_the_first_stopped():
    """Bytes that came are kept: each byte is fetched once, from whoever had it."""
    first = FakeSource(DATA, faults=[Fault(after=4321, then=BlobNotFoundError("sha256:x", "r"))])
    second = FakeSource(DATA, "mirror.example/app")
    assert Bench(first, second).run().bytes_fetched == len(DATA)
    assert second.opened == [(4321, len(DATA) - 4321)]


def test_transient_errors_end_with_the_tries():
    """A source that only resets is asked as often as is configured, then the next."""
    first = FakeSource(DATA, faults=[Fault(at_open=RESET)] * 99)
    second = FakeSource(DATA, "mirror.example/app")
    Bench(first, second, attempts=4).run()
    assert len(first.opened) == 4


def test_a_source_that_trickles_ends_with_the_budget():
    """One byte and a reset, for ever: the seconds of pauses are bounded."""
    bench = Bench(FakeSource(DATA, faults=[Fault(after=1, then=RESET)] * 9999), budget_s=5)
    bench.fails(UnavailableError)
    assert sum(bench.pauses.paused_s) <= 5


@pytest.mark.parametrize("parallel", [False, True])
def test_a_source_that_lies_about_bytes_is_dropped(parallel):
    """Wrong bytes of the right length: all of them go, also those in S3, and the next source gives its own."""
    liar = FakeSource(DATA[:5000] + b"\0" + DATA[5001:], "liar.example/app")
    honest = FakeSource(DATA, "mirror.example/app")
    bench = Bench(liar, honest, parallel=parallel)
    done = bench.run()
    assert done.source == "mirror.example/app"
    assert bench.objects() == [done.object.key]
    assert bench.store.list_uploads("") == []


def test_a_lone_liar_is_named():
    """No other source: the error says who served what, nothing of it stays in S3, nothing is remembered."""
    liar = FakeSource(DATA[:-1] + b"!", "liar.example/app")
    bench = Bench(liar)
    error = bench.fails(DigestMismatchError)
    assert (error.expected, error.source) == (digest_of(DATA), "liar.example/app")
    assert error.actual == digest_of(liar.data)
    assert bench.objects() == []
    assert bench.journal.upload is None


def test_a_small_lie_is_named_before_it_is_stored():
    """The one-part path checks before it writes."""
    bench = Bench(FakeSource(b"lie!", "liar.example/app"), data=b"true")
    assert bench.fails(DigestMismatchError).source == "liar.example/app"
    assert bench.objects() == []


def test_an_honest_source_is_not_blamed_for_anothers_bytes():
    """The first lied and broke off, the second went on from there: it gets to give all of them."""
    liar = FakeSource(b"\0" * 4000 + DATA[4000:], "liar.example/app")
    liar.faults = [Fault(after=4000, then=BlobNotFoundError("sha256:x", "liar.example/app"))]
    honest = FakeSource(DATA, "mirror.example/app")
    done = Bench(liar, honest).run()
    assert done.source == "mirror.example/app"
    assert honest.opened[-1] == (0, None)


def test_an_empty_descriptor_of_another_digest_fails():
    """Size 0 and a digest that is not that of nothing: an error, not an endless loop."""
    bench = Bench(FakeSource(b""), data=b"")
    transfer = bench.make()
    transfer._descriptor = Descriptor(media_type="x", digest=digest_of(b"something"), size_bytes=0)
    with pytest.raises(DigestMismatchError):
        transfer.run()


def test_a_source_of_another_size_is_passed_over():
    """It says another total: not a byte of it is taken, and what came before is kept."""
    first = FakeSource(DATA, faults=[Fault(after=3000, then=BlobNotFoundError("sha256:x", "r"))])
    wrong = FakeSource(DATA + b"more", "wrong.example/app")
    right = FakeSource(DATA, "mirror.example/app")
    done = Bench(first, wrong, right).run()
    assert wrong.served_bytes == 0
    assert done.bytes_fetched == len(DATA)


def test_a_lone_source_of_another_size_is_named():
    """The error has both sizes."""
    error = Bench(FakeSource(DATA + b"more")).fails(SizeMismatchError)
    assert (error.expected_bytes, error.actual_bytes) == (len(DATA), len(DATA) + 4)


def test_a_source_that_hides_its_size_and_ends_early_never_counts_as_whole():
    """Truncated each time, without a Content-Length: transient, then given up."""
    source = FakeSource(DATA[:6000])
    source.total_bytes = None
    assert Bench(source).fails(UnavailableError)


@pytest.mark.parametrize("how", ["status 200", "416"])
@pytest.mark.parametrize("parallel", [False, True])
def test_a_source_without_ranges_is_read_in_one_piece(how, parallel):
    """Parallel ranges are refused: start over with one request; no upload is left behind."""
    source = FakeSource(DATA)
    if how == "416":
        source.range_error = RangeRefusedError("blob", source.name, 0)
    else:
        source.ranges = False
    bench = Bench(source, parallel=parallel)
    bench.run()
    assert source.opened[-1] == (0, None)
    assert bench.store.list_uploads("") == []


@pytest.mark.parametrize("how", ["status 200", "416"])
def test_going_on_without_ranges_reads_from_the_start_again(how):
    """A reset, and ranges are refused: what came is skipped in the new response, not taken twice."""
    source = FakeSource(DATA, faults=[Fault(after=2500, then=RESET)])
    if how == "416":
        source.range_error = RangeRefusedError("blob", source.name, 0)
    else:
        source.ranges = False
    done = Bench(source).run()
    assert done.bytes_fetched == source.served_bytes


def test_the_most_telling_error_is_raised():
    """Of "gone", "no answer" and "not there", the definite one is what the caller can do something about."""
    sources = [
        FakeSource(DATA, "a", faults=[Fault(at_open=BlobNotFoundError("sha256:x", "a"))] * 9),
        FakeSource(DATA, "b", faults=[Fault(at_open=RESET)] * 9),
        FakeSource(DATA, "c", faults=[Fault(at_open=SessionGoneError("s1"))] * 9),
    ]
    bench = Bench(*sources)
    assert bench.fails(BlobNotFoundError).where.startswith("a (also tried: b: ")
    assert all(source.opened for source in sources)


# -- stopping, losing the flight, a store that fails -----------------------------------------------------


@pytest.mark.parametrize("parallel", [False, True])
def test_stop_ends_it_and_leaves_the_upload(parallel):
    """Told to stop, it ends within a chunk; what was uploaded stays for a successor."""
    bench = Bench(FakeSource(DATA), parallel=parallel)
    seen = count()

    def on_read(_offset, _count):
        if next(seen) == 15:
            bench.transfer.stop()

    bench.sources[0].on_read = on_read
    with pytest.raises(TransferStoppedError):
        bench.make().run()
    assert bench.sources[0].served_bytes < len(DATA)
    assert bench.journal.upload is not None
    assert bench.store.list_uploads("") != []
    assert all(s.is_discarded for s in bench.stagings)
    bench.assert_no_buffer_is_out()


def test_stop_ends_a_wait_for_a_buffer():
    """Other transfers hold the whole pool: a stop is noticed all the same."""
    bench = Bench(FakeSource(DATA), buffers=1)
    held = bench.pool.acquire(PART, threading.Event())
    transfer = bench.make()
    ended = []

    def run():
        with suppress(TransferStoppedError):
            transfer.run()
            return
        ended.append(True)

    thread = threading.Thread(target=run)
    thread.start()
    transfer.stop()
    thread.join(10)
    assert ended == [True]
    bench.pool.release(held)


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("call", ["begin_upload", "record_part", "report"])
def test_a_lost_flight_ends_the_transfer(call, parallel):
    """A stale owner stops at the first write that is refused; it drops nothing that a successor may use."""
    bench = Bench(FakeSource(DATA), FakeSource(DATA, "mirror.example/app"), parallel=parallel)
    bench.journal.lost_at = call
    bench.fails(StaleFenceError)
    assert bench.sources[1].opened == []
    assert bench.store.list_uploads("") != []


def test_a_stale_owner_deletes_nothing():
    """Its bytes are wrong and its flight is lost: a successor may have resumed that very upload."""
    bench = Bench(FakeSource(DATA[:-1] + b"!"))
    bench.journal.lost_at = "drop_upload"
    bench.fails(StaleFenceError)
    assert bench.objects() == ["blobs/x/1"]


def test_a_store_that_fails_ends_the_transfer():
    """S3 does not take a part: that is the error, whatever the readers see; the upload stays."""
    bench = Bench(FakeSource(DATA), parallel=True)
    bench.store.upload_part = lambda *_args: (_ for _ in ()).throw(UnavailableError("S3", "no answer"))
    assert bench.fails(UnavailableError).what == "S3"
    assert bench.journal.upload is not None


def test_the_successor_of_a_stopped_transfer_fetches_the_rest():
    """Stopped half-way and resumed: the two of them fetch each byte about once."""
    first = Bench(FakeSource(DATA))
    first.sources[0].on_read = lambda offset, _count: first.transfer.stop() if offset >= 6 * PART else None
    with pytest.raises(TransferStoppedError):
        first.make().run()
    second = Bench(FakeSource(DATA), resume=first.journal.upload)
    second.store = first.store
    done = second.run()
    assert done.object.key == first.journal.upload.key
    assert first.sources[0].served_bytes + done.bytes_fetched <= len(DATA) + 3 * PART
