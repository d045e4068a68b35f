"""Virtual time: an event loop whose clock jumps to the next timer, and processes on it that can be stopped.

Everything that runs belongs to a process, or to none (the world). It is known by a context variable, which tasks,
timers and callbacks inherit, so that code under test needs to know nothing of it. What is due for a process that is
stopped is put aside: for ever where it was killed, as no clean-up runs after a ``kill -9``; until it goes on where it
was paused, and then all of it runs at once, as after a SIGSTOP.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections import deque
from enum import Enum

_PROCESS = contextvars.ContextVar("process", default=None)
#: Turns without a step of the clock after which code is taken to spin.
_SPINNING = 5_000_000


class DeadlockError(AssertionError):
    """Nothing is left to happen, and what was waited for has not."""


class Fate(Enum):
    """What a process can be."""

    RUNNING = "running"
    PAUSED = "paused"
    KILLED = "killed"


class Process:
    """What runs together, and is stopped together."""

    def __init__(self, loop, name):
        self.name = name
        self.fate = Fate.RUNNING
        self.context = contextvars.copy_context()
        self.context.run(_PROCESS.set, self)
        self._loop = loop
        #: Callbacks that were due while it did not run.
        self.parked = deque()

    def __repr__(self):
        return f"<Process {self.name}: {self.fate.value}>"

    @property
    def is_alive(self):
        return self.fate is not Fate.KILLED

    def spawn(self, coroutine):
        """Run a coroutine as a task of this process."""
        return self._loop.create_task(coroutine, context=self.context.copy())

    def pause(self):
        if self.is_alive:
            self.fate = Fate.PAUSED

    def resume(self):
        if self.fate is Fate.PAUSED:
            self.fate = Fate.RUNNING
            self._loop.unpark(self)

    def kill(self):
        self.fate = Fate.KILLED


class _Handle:
    """A callback that is due, or will be."""

    __slots__ = ("args", "callback", "context", "is_cancelled", "process", "when_s")

    def __init__(self, callback, args, context, when_s):
        self.callback = callback
        self.args = args
        self.context = contextvars.copy_context() if context is None else context
        self.process = self.context.get(_PROCESS)
        self.when_s = when_s
        self.is_cancelled = False

    def cancel(self):
        self.is_cancelled = True
        self.callback = self.args = None

    def cancelled(self):
        return self.is_cancelled

    def when(self):
        return self.when_s


class VirtualLoop(asyncio.AbstractEventLoop):
    """What asyncio needs of an event loop, without a file descriptor and without waiting."""

    def __init__(self):
        self.now_s = 0.0
        self.turns = 0
        #: Turns at the clock's last step.
        self._stepped_at = 0
        self._ready = deque()
        self._timers = []
        self._numbers = itertools.count()
        self._processes = []

    # -- running ----------------------------------------------------------------------------------------------

    def run(self, main):
        """Run a coroutine to its end, then everything else that was begun to its own, without letting time pass."""
        asyncio._set_running_loop(self)
        try:
            task = self.create_task(main)
            while not task.done():
                self._turn()
            return task.result()
        finally:
            try:
                self._end_all()
            finally:
                asyncio._set_running_loop(None)

    def process(self, name):
        """Return a new process."""
        process = Process(self, name)
        self._processes.append(process)
        return process

    def unpark(self, process):
        self._ready.extend(process.parked)
        process.parked.clear()

    def _turn(self):
        if not self._ready:
            self._jump()
        handle = self._ready.popleft()
        if handle.is_cancelled:
            return
        process = handle.process
        if process is not None and process.fate is not Fate.RUNNING:
            process.parked.append(handle)
            return
        self.turns += 1
        handle.context.run(handle.callback, *handle.args)

    def _jump(self):
        """Go on to the next timer's time, and take all that are due then."""
        timers = self._timers
        while timers and timers[0][2].is_cancelled:
            heapq.heappop(timers)
        if not timers:
            raise DeadlockError(f"nothing is left to happen at {self.now_s:.3f} s")
        if timers[0][0] > self.now_s:
            self.now_s = timers[0][0]
            self._stepped_at = self.turns
        elif self.turns - self._stepped_at > _SPINNING:
            raise DeadlockError(f"the clock stands still at {self.now_s:.3f} s, and something spins")
        while timers and timers[0][0] <= self.now_s:
            self._ready.append(heapq.heappop(timers)[2])

    def _end_all(self):
        """End the tasks that are left: a task that is collected while it waits would run its clean-up anyway."""
        for process in self._processes:
            process.fate = Fate.RUNNING
            self.unpark(process)
        for _ in range(100):
            left = asyncio.all_tasks(self)
            if not left:
                return
            for task in left:
                task.cancel()
            while self._ready:
                self._turn()
            if asyncio.all_tasks(self) and self._timers:
                self._jump()
        raise DeadlockError(f"{len(left)} tasks don't end when cancelled")

    # -- what asyncio asks for --------------------------------------------------------------------------------

    def time(self):
        return self.now_s

    def call_soon(self, callback, *args, context=None):
        handle = _Handle(callback, args, context, self.now_s)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(self, when, callback, *args, context=None):
        handle = _Handle(callback, args, context, when)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def call_later(self, delay, callback, *args, context=None):
        return self.call_at(self.now_s + delay, callback, *args, context=context)

    def create_future(self):
        return asyncio.Future(loop=self)

    def create_task(self, coro, *, name=None, context=None):
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def get_debug(self):
        return False

    def is_running(self):
        return True

    def is_closed(self):
        return False

    def call_exception_handler(self, context):
        """Ignore it: an error that nobody asks for is one that its task's owner has been told of otherwise."""

    async def shutdown_asyncgens(self):
        """Do nothing: nothing here is left to an asynchronous generator."""


async def all_or_nothing(coroutines):
    """Run all at once; where one fails, cancel the others and raise its error.

    As a group of tasks does, which goes through a set of them, in another order each time.
    """
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
