"""A seeded network between processes and services: delay, loss, reordering, partition; and what each service is asked.

A call is one message there and one back. Each takes a time of its own, so messages overtake one another. A request
that is lost was not carried out, an answer that is lost was: the caller can't tell, and gets UnavailableError when its
deadline has passed.
"""

from __future__ import annotations

import contextvars
import zlib
from collections import Counter
from dataclasses import dataclass

from cluster.errors import ClusterError, UnavailableError

#: Of services, which are no processes: nothing stops them. An empty context.
WORLD = contextvars.Context()


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """How the network is."""

    #: Least and most seconds that a message takes.
    delay_s: tuple[float, float] = (0.0002, 0.001)
    #: Share of messages that are lost.
    loss: float = 0.0
    #: Share of messages that come late, and by how many seconds at most: after the caller has given up, or asked again.
    late: float = 0.0
    late_s: float = 15.0
    #: Which services' messages.
    late_at: tuple[str, ...] = ("redis", "s3", "registry")
    #: Seconds until a call without an answer is given up.
    deadline_s: float = 2.0


class Pipe:
    """A link of so many bytes a second, or a server of so many operations; who comes first is served first."""

    def __init__(self, per_s):
        self._per_s = per_s
        self._free_s = 0.0

    def take(self, now_s, amount):
        """Return when *amount* that comes now is through."""
        self._free_s = max(now_s, self._free_s) + amount / self._per_s
        return self._free_s


class Service:
    """A server: how much it can do, and what it was asked, by key and second of virtual time."""

    def __init__(self, name, *, ops_per_s=float("inf")):
        self.name = name
        self.operations = 0
        self.messages = 0
        #: Most operations in one second: of all keys, and of one, with that key.
        self.busiest_s = 0
        self.busiest_key = (0, "")
        self.most_messages_s = 0
        self._pipe = Pipe(ops_per_s)
        self._second = -1
        self._keys = Counter()
        self._told = 0

    def serve(self, now_s, keys):
        """Take an operation on each of *keys*; return when they are done."""
        self._pass(now_s)
        self.operations += len(keys)
        self._keys.update(keys)
        return self._pipe.take(now_s, len(keys))

    def tell(self, now_s):
        """Take one message to one who listens; return when it is sent."""
        self._pass(now_s)
        self.messages += 1
        self._told += 1
        # Writing to a client that listens costs a Redis a fraction of a command.
        return self._pipe.take(now_s, 0.2)

    def close(self):
        """Count the last second."""
        self._pass(float("inf"))

    def _pass(self, now_s):
        second = now_s if now_s == float("inf") else int(now_s)
        if second == self._second:
            return
        self._second = second
        if self._keys:
            self.busiest_s = max(self.busiest_s, self._keys.total())
            key, count = self._keys.most_common(1)[0]
            self.busiest_key = max(self.busiest_key, (count, key))
            self._keys.clear()
        self.most_messages_s = max(self.most_messages_s, self._told)
        self._told = 0


class Network:
    """Carries messages."""

    def __init__(self, loop, rng, weather):
        self.loop = loop
        self.rng = rng
        self.weather = weather
        self.is_closed = False
        #: (from, to) by name: no message gets through.
        self.cut = set()
        #: Of all that was sent, in order: two runs of one seed have the same.
        self.trace = 0

    def partition(self, one, other, *, back_only=False):
        """Cut two off from each other; *back_only*: requests of *one* arrive, and the answers do not."""
        if not back_only:
            self.cut.add((one, other))
        self.cut.add((other, one))

    def heal(self, one, other):
        self.cut -= {(one, other), (other, one)}

    def delay(self, service):
        """Return how many seconds a message to or from a service takes."""
        low, high = self.weather.delay_s
        seconds = low + (high - low) * self.rng.random()
        if self._is_late_at(service) and self.rng.random() < self.weather.late:
            seconds += self.weather.late_s * self.rng.random()
        return seconds

    def is_lost(self, source, target):
        return (bool(self.weather.loss) and self.rng.random() < self.weather.loss) or (source, target) in self.cut

    async def call(self, process, service, keys, step, *, deadline_s=None):
        """Have *step* carried out by a service and return what it returns, or raise what it raises.

        Args:
            process: Who calls.
            service: Whom.
            keys: What for, one for each operation that it is to the service.
            step: Called when the request arrives; returns the answer, and when it is sent at the earliest.
            deadline_s: Seconds until it is given up; None: as the weather says.
        """
        if self.is_closed:
            raise UnavailableError(service.name, "the simulation is over")
        loop = self.loop
        self.trace = zlib.crc32(f"{loop.now_s} {process.name} {service.name} {keys}".encode(), self.trace)
        answer = loop.create_future()
        given_up_s = loop.now_s + (deadline_s or self.weather.deadline_s)
        is_lost = self.is_lost(process.name, service.name)
        if is_lost or self._is_late_at(service):
            giving_up = loop.call_at(given_up_s, _give_up, answer, service.name, context=process.context)
            answer.add_done_callback(lambda _answer: giving_up.cancel(), context=WORLD)

        def arrive():
            sent_s = service.serve(loop.now_s, keys)
            result = error = None
            try:
                result, at_s = step()
                sent_s = max(sent_s, at_s)
            except ClusterError as exc:
                error = exc
            if self.is_lost(service.name, process.name):
                loop.call_at(max(given_up_s, loop.now_s), _give_up, answer, service.name, context=process.context)
                return
            loop.call_at(sent_s + self.delay(service), _answer, answer, result, error, context=process.context)

        if not is_lost:
            loop.call_later(self.delay(service), arrive, context=WORLD)
        return await answer

    def _is_late_at(self, service):
        return bool(self.weather.late) and service.name in self.weather.late_at

    def tell(self, service, process, receive, *args):
        """Send a message that nobody waits for from a service to a process."""
        if self.is_lost(service.name, process.name):
            return
        sent_s = service.tell(self.loop.now_s)
        self.loop.call_at(sent_s + self.delay(service), receive, *args, context=process.context)


def _answer(answer, result, error):
    if answer.done():
        return
    if error is None:
        answer.set_result(result)
    else:
        answer.set_exception(error)


def _give_up(answer, name):
    if not answer.done():
        answer.set_exception(UnavailableError(name, "no answer"))


def run_now(coroutine):
    """Carry out a method of a fake, which never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a fake waits")
