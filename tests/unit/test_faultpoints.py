"""Fault points: free where nobody armed them, exact where somebody did."""

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading
import timeit

import pytest

from cluster.errors import ConfigError, DeadlineExceededError, InternalError, StaleFenceError, UnavailableError
from cluster.faultpoints import (
    ERRORS,
    Count,
    FaultPlan,
    FaultPoint,
    FaultRule,
    Hang,
    Kill,
    Raise,
    ahit,
    armed,
    disarm,
    hit,
    is_armed,
    listing,
)
from storage.faults import ProcessFaults, arm_from_environment, hits_recorded, never_hit

COMMIT = FaultPoint.COMMIT_BEFORE
PIN = FaultPoint.PIN_BEFORE


class RecordingPerformer:
    """Writes down what it is asked for."""

    def __init__(self):
        self.done = []

    def kill(self):
        self.done.append("kill")

    def hang(self, gate):
        self.done.append(f"hang {gate}")

    async def ahang(self, gate):
        self.done.append(f"ahang {gate}")

    def count(self, file, point):
        self.done.append(f"count {point}")

    def claim(self, file):
        is_mine = f"claim {file}" not in self.done
        self.done.append(f"claim {file}")
        return is_mine


@pytest.fixture
def performer():
    return RecordingPerformer()


def run_process(code, environ=None):
    """Run *code* in a process of its own, armed from *environ*; return how it ended."""
    script = "import os\nfrom cluster.faultpoints import *\nfrom storage.faults import *\n"
    script += f"arm_from_environment(os.environ)\n{textwrap.dedent(code)}"
    return subprocess.run(
        [sys.executable, "-c", script], env=environ or {}, capture_output=True, text=True, timeout=60, check=False
    )


# -- the points -------------------------------------------------------------------------------------------


def test_every_point_says_what_has_and_has_not_happened():
    """A point is a name of dotted words and one line of meaning, and all are listed."""
    for point in FaultPoint:
        assert point.meaning
        assert "\n" not in point.meaning
        assert set(point) <= set("abcdefghijklmnopqrstuvwxyz.-")
        assert f"{point} " in listing()
    assert len(listing().splitlines()) == len(FaultPoint)


def test_a_hit_of_an_unarmed_process_does_nothing_and_costs_next_to_nothing():
    """Unarmed, passing a point costs well under a microsecond even on a busy machine, so it may stand anywhere."""
    assert not is_armed()
    seconds = min(timeit.repeat(lambda: hit(COMMIT), number=10_000, repeat=20)) / 10_000
    assert seconds < 500e-9


async def test_an_unarmed_hit_in_a_coroutine_does_nothing():
    """The asynchronous twin is as silent."""
    await ahit(COMMIT)


# -- plans ------------------------------------------------------------------------------------------------


def test_a_plan_is_read_from_text():
    """Points, counts, actions, arguments and claims; comments and empty entries say nothing."""
    plan = FaultPlan.parse("""
        # the owner dies once
        fetch.part-uploaded@3=kill!/tmp/claim; commit.before=hang:/tmp/gate
        pin.before@2+=error:UnavailableError;; *=count:/tmp/a=b
    """)
    assert plan.rules == (
        FaultRule(point=FaultPoint.FETCH_PART_UPLOADED, first=3, last=3, action=Kill(), claim="/tmp/claim"),  # noqa: S108 - never made
        FaultRule(point=COMMIT, action=Hang("/tmp/gate")),  # noqa: S108 - never made
        FaultRule(point=PIN, first=2, action=Raise(ERRORS["UnavailableError"])),
        FaultRule(point=None, action=Count("/tmp/a=b")),  # noqa: S108 - never made
    )


def test_a_plan_that_can_not_be_read_names_every_fault():
    """A typo in a plan must not pass for a fault that never struck."""
    entries = [
        "commit.before",
        "commit.befor=kill",
        "commit.before@0=kill",
        "commit.before@x=kill",
        "commit.before=explode",
        "commit.before=kill:9",
        "commit.before=hang",
        "commit.before=error:NoSuchError",
        "*=count:",
    ]
    with pytest.raises(ConfigError) as caught:
        FaultPlan.parse(";".join([*entries, "pin.before=kill"]))
    assert [fault.startswith(f"{entry}: ") for fault, entry in zip(caught.value.faults, entries, strict=True)] == [
        True
    ] * len(entries)


@pytest.mark.parametrize(
    ("where", "struck"),
    [("commit.before", [1, 2, 3, 4]), ("commit.before@2", [2]), ("commit.before@3+", [3, 4]), ("*@1", [1])],
)
def test_a_rule_strikes_at_its_hits_only(performer, where, struck):
    """No count means every hit, ``@2`` the second, ``@3+`` the third and all later ones."""
    times = []
    with armed(FaultPlan.parse(f"{where}=kill"), performer):
        for number in range(1, 5):
            before = len(performer.done)
            hit(COMMIT)
            if len(performer.done) > before:
                times.append(number)
        if not where.startswith("*"):
            hit(PIN)
    assert times == struck
    assert len(performer.done) == len(struck)


def test_points_are_counted_apart(performer):
    """The hits of one point don't use up another's."""
    with armed(FaultPlan.parse("*@2=kill"), performer):
        hit(COMMIT)
        hit(PIN)
        assert performer.done == []
        hit(PIN)
    assert performer.done == ["kill"]


def test_hits_are_counted_before_anything_strikes(performer):
    """A hit that kills is on record: the count comes first, wherever it stands in the plan."""
    with armed(FaultPlan.parse("commit.before=kill;*=count:f"), performer):
        hit(COMMIT)
    assert performer.done == ["count commit.before", "kill"]


@pytest.mark.parametrize("name", sorted(ERRORS))
async def test_a_rule_raises_the_named_error(performer, name):
    """Every error that a plan can name is raised as itself, in threads and coroutines alike, and names the point."""
    with armed(FaultPlan.parse(f"commit.before=error:{name}"), performer):
        with pytest.raises((Exception,), match=r"commit\.before") as caught:
            hit(COMMIT)
        assert type(caught.value).__name__ == name
        with pytest.raises(type(caught.value)):
            await ahit(COMMIT)


def test_a_plan_made_in_code_raises_any_error(performer):
    """A test within the process is not bound to the errors that text can name."""
    plan = FaultPlan((FaultRule(point=COMMIT, action=Raise(lambda point: StaleFenceError(point, 7))),))
    with armed(plan, performer), pytest.raises(StaleFenceError, match="fence 7"):
        hit(COMMIT)


async def test_a_hang_blocks_the_thread_or_only_the_task(performer):
    """``hit`` asks for a hang of the thread, ``ahit`` for one of the task."""
    with armed(FaultPlan.parse("commit.before=hang:g"), performer):
        hit(COMMIT)
        await ahit(COMMIT)
    assert performer.done == ["hang g", "ahang g"]


def test_a_claim_lets_one_process_act(performer):
    """Where a plan is shared, only who makes the claim acts; the count goes on for the others."""
    with armed(FaultPlan.parse("commit.before=kill!c"), performer):
        hit(COMMIT)
        hit(COMMIT)
    assert performer.done == ["claim c", "kill", "claim c"]


def test_a_claim_is_asked_for_only_when_the_rule_is_due(performer):
    """A rule for the third hit claims nothing at the first."""
    with armed(FaultPlan.parse("commit.before@3=kill!c"), performer):
        hit(COMMIT)
    assert performer.done == []


def test_plans_stack(performer):
    """A plan armed within another adds to it, and its end leaves the outer one as it was."""
    with armed(FaultPlan.parse("*=count:f"), performer):
        with armed(FaultPlan.parse("commit.before=kill"), performer):
            hit(COMMIT)
        hit(COMMIT)
    assert performer.done == ["count commit.before", "kill", "count commit.before"]
    assert not is_armed()
    disarm()


def test_hits_from_threads_are_counted_exactly(performer):
    """The third hit is the third, whichever threads the hits come from."""
    barrier = threading.Barrier(8)

    def hits():
        barrier.wait(10)
        for _ in range(250):
            hit(COMMIT)

    with armed(FaultPlan.parse("commit.before@2000=kill"), performer):
        threads = [threading.Thread(target=hits) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert performer.done == ["kill"]


# -- performed on a real process ----------------------------------------------------------------------------


def test_kill_ends_the_process_without_any_cleaning_up(tmp_path):
    """SIGKILL: no ``finally``, no exit handler, no flush; what was counted before is on disk."""
    hits = tmp_path / "hits"
    ended = run_process(
        """
        try:
            hit(FaultPoint.COMMIT_BEFORE)
            hit(FaultPoint.COMMIT_BEFORE)
        finally:
            print("cleaned up", flush=True)
        """,
        {"LAZYFARM_FAULTS": "commit.before@2=kill", "LAZYFARM_FAULT_HITS": str(hits)},
    )
    assert ended.returncode == -signal.SIGKILL
    assert ended.stdout == ""
    assert hits_recorded(hits)[COMMIT] == 2


def test_of_processes_that_share_a_plan_one_is_killed(tmp_path):
    """With a claim, the process that takes over from a killed one lives."""
    environ = {"LAZYFARM_FAULTS": f"commit.before=kill!{tmp_path / 'claim'}"}
    code = "hit(FaultPoint.COMMIT_BEFORE)"
    assert [run_process(code, environ).returncode for _ in range(3)] == [-signal.SIGKILL, 0, 0]


def test_a_hang_tells_that_it_arrived_and_ends_when_the_gate_opens(tmp_path):
    """A test sees the arrival and decides when the process goes on."""
    gate = tmp_path / "gate"
    with armed(FaultPlan.parse(f"commit.before=hang:{gate}"), ProcessFaults()):
        thread = threading.Thread(target=hit, args=(COMMIT,))
        thread.start()
        arrived = gate.with_name("gate.arrived")
        while not arrived.exists():
            thread.join(0.005)
            assert thread.is_alive()
        gate.touch()
        thread.join(30)
    assert not thread.is_alive()


async def test_a_hang_of_a_task_lets_the_loop_go_on_and_can_be_cancelled(tmp_path):
    """Only the task that passes the point hangs, until the gate opens or it is cancelled."""
    gate = tmp_path / "gate"
    with armed(FaultPlan.parse(f"commit.before=hang:{gate}"), ProcessFaults()):
        cancelled = asyncio.create_task(ahit(COMMIT))
        patient = asyncio.create_task(ahit(COMMIT))
        await asyncio.sleep(0)
        assert gate.with_name("gate.arrived").read_text().count("\n") == 2
        cancelled.cancel()
        with pytest.raises(asyncio.CancelledError):
            await cancelled
        assert not patient.done()
        gate.touch()
        async with asyncio.timeout(30):
            await patient


async def test_a_hang_gives_up_in_the_end(tmp_path):
    """A test that died leaves no process waiting at its gate for ever."""
    faults = ProcessFaults(hang_s=0.0)
    with armed(FaultPlan.parse(f"commit.before=hang:{tmp_path / 'gate'}"), faults):
        with pytest.raises(DeadlineExceededError):
            hit(COMMIT)
        with pytest.raises(DeadlineExceededError):
            await ahit(COMMIT)


def test_a_fault_file_that_can_not_be_written_is_said(tmp_path):
    """A gate, count or claim in a folder that is gone is an error, not a silence that looks like success."""
    faults = ProcessFaults()
    gone = str(tmp_path / "gone" / "file")
    for act in (lambda: faults.hang(gone), lambda: faults.count(gone, COMMIT), lambda: faults.claim(gone)):
        with pytest.raises(InternalError, match="No such file"):
            act()


# -- armed from the environment -------------------------------------------------------------------------------


@pytest.fixture
def disarmed():
    """Take back what a test arms for good."""
    yield
    while is_armed():
        disarm()


def test_an_environment_without_a_plan_arms_nothing(disarmed):
    """A production process stays unarmed."""
    assert arm_from_environment({"PATH": "/bin"}) is False
    assert not is_armed()


def test_a_plan_may_be_in_a_file(disarmed, tmp_path):
    """The variable names a file where it holds no plan itself."""
    plan = tmp_path / "plan"
    plan.write_text("commit.before=error:UnavailableError\n")
    assert arm_from_environment({"LAZYFARM_FAULTS": str(plan)}) is True
    with pytest.raises(UnavailableError):
        hit(COMMIT)


def test_a_plan_that_is_missing_or_malformed_stops_the_process(disarmed, tmp_path):
    """A shell that was to be armed and can't be does not start unarmed."""
    for value in (str(tmp_path / "missing"), "commit.before=explode"):
        with pytest.raises(ConfigError):
            arm_from_environment({"LAZYFARM_FAULTS": value})
    assert not is_armed()


def test_points_that_nobody_hit_are_found(disarmed, tmp_path):
    """The record of hits tells which points no test has tried, over all processes that share it."""
    file = tmp_path / "hits"
    assert set(never_hit(file)) == set(FaultPoint)
    arm_from_environment({"LAZYFARM_FAULT_HITS": str(file)})
    hit(COMMIT)
    run_process("hit(FaultPoint.COMMIT_BEFORE); hit(FaultPoint.PIN_BEFORE)", {"LAZYFARM_FAULT_HITS": str(file)})
    with file.open("a") as handle:
        handle.write("point.of-an-older-release 1\n")
    assert hits_recorded(file)[COMMIT] == 2
    assert hits_recorded(file)[PIN] == 1
    assert set(FaultPoint) - set(never_hit(file)) == {COMMIT, PIN}
