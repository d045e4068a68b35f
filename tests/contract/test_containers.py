"""Commands in real containers: what they see, what stays of them, and how they end."""

# What blocks here takes milliseconds, and nothing else runs in these loops.
# ruff: noqa: ASYNC221, ASYNC240

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.errors import (
    ContainerError,
    DeadlineExceededError,
    FileActionError,
    InternalError,
    LimitUnavailableError,
    MissingSecretError,
    ProcessFailedError,
    ProcessNotStartedError,
    ProcessOutOfMemoryError,
    RuntimeMissingError,
    UnavailableError,
    UnknownUserError,
    UnusableSecretError,
)
from cluster.graph import BindMount, CacheMount, Limits, Network, RunOp, SecretMount, Sharing, TmpfsMount
from cluster.job import LogStream
from storage.containers.cgroups import Cgroups
from storage.containers.logs import LogLine
from storage.containers.runc import Runc
from tests.doubles.commands import make_root
from tests.doubles.layers import facts

pytestmark = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(
        shutil.which("runc") is None and not Path("/usr/sbin/runc").exists(), reason="runc is not installed"
    ),
]
REPOSITORY = Path(__file__).parents[2]
#: For ``sleep``: long, and no other test session's.
NAP = f"1000.{os.getpid()}"
#: Far more than anything here takes.
LONG_S = 90.0


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("template") / "root")


@pytest.fixture
def root(template, tmp_path):
    return Path(shutil.copytree(template, tmp_path / "root"))


@pytest.fixture
def runc(tmp_path):
    home = tmp_path / "containers"
    yield Runc(home)
    # Whatever a test does: nothing is left behind.
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    if home.exists():
        assert list((home / "bundles").iterdir()) == []
        assert list((home / "runc").iterdir()) == []


class Log:
    """Keeps what a command said."""

    def __init__(self):
        self.lines: list[LogLine] = []
        self._changed = asyncio.Event()

    async def __call__(self, lines):
        self.lines += lines
        self._changed.set()

    async def until(self, text):
        """Wait until *text* has come."""
        async with asyncio.timeout(LONG_S):
            while text not in self.text:
                await self._changed.wait()
                self._changed.clear()

    @property
    def text(self):
        return "".join(line.text + ("" if line.is_partial else "\n") for line in self.lines)


async def run(runc, root, *args, log=None, inputs=None, values=None, timeout_s=LONG_S, **options):
    """Run a shell script, or words, and return what it said."""
    log = Log() if log is None else log
    args = args if len(args) > 1 else ("/bin/sh", "-ec", args[0])
    op = RunOp(args=args, **options)
    await runc.run(op, root, binds=inputs or {}, secrets=values or {}, log=log, timeout_s=timeout_s)
    return log.text if isinstance(log, Log) else ""


def napping():
    """Return the command lines of the processes that sleep for :data:`NAP`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found.append(path.read_bytes())
        except OSError:
            continue
    return [line for line in found if NAP.encode() in line]


# -- what a command sees ------------------------------------------------------------------------------


async def test_a_command_runs_in_its_root(runc, root):
    """What it changes stays; it sees its own arguments, environment, host name and processes."""
    said = await run(
        runc,
        root,
        "/bin/sh",
        "-c",
        'echo "$0 $GREETING $PATH $http_proxy"; echo $$; cat /proc/sys/kernel/hostname; '
        "echo made > /new; rm /etc/group; id -u",
        "zero",
        env=(("GREETING", "hello world"), ("GREETING", "hello")),
        proxy_env=(("GREETING", "proxy"), ("http_proxy", "p")),
        hostname="box",
    )

    assert said == "zero hello /usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin p\n1\nbox\n0\n"
    assert (root / "new").read_text() == "made\n"
    assert not (root / "etc/group").exists()


async def test_nothing_of_the_container_is_left_in_its_root(runc, root, tmp_path):
    """Mount points are gone again, and the directories that they were made in look untouched."""
    (tmp_path / "input").mkdir()
    (root / "etc/hosts").symlink_to("../run/hosts")
    before = facts(root)

    await run(
        runc,
        root,
        "cat /etc/hosts /etc/resolv.conf /run/secrets/s; echo x > /srv/cache/x; echo x > /t/x; ls /in",
        inputs={1: tmp_path / "input"},
        values={"s": b"value"},
        network=Network.HOST,
        binds=(BindMount(target="/in", input=1),),
        secrets=(SecretMount(id="s", target="/run/secrets/s"),),
        caches=(CacheMount(target="/srv/cache", id="c"),),
        tmpfs=(TmpfsMount(target="/t"),),
    )

    assert facts(root) == before


async def test_what_a_command_puts_beside_a_mount_stays(runc, root):
    """Only empty mount points are removed."""
    await run(runc, root, "echo x > /srv/kept", caches=(CacheMount(target="/srv/cache", id="c"),))

    assert sorted(path.name for path in (root / "srv").iterdir()) == ["kept"]


async def test_without_network_there_is_only_loopback(runc, root):
    """It is up, and localhost is known."""
    said = await run(
        runc, root, "tail -n +3 /proc/net/dev; cat /sys/class/net/lo/flags; cat /etc/hosts /etc/resolv.conf"
    )

    device, flags, hosts, _ = said.splitlines()
    assert device.strip().startswith("lo:")
    assert int(flags, 16) & 1
    assert hosts.split() == ["127.0.0.1", "localhost", "lazyfarm"]


async def test_the_hosts_network_comes_with_its_resolver(runc, root):
    """The network namespace is ours, and so are the files that names are looked up by; these are read-only."""
    said = await run(
        runc,
        root,
        "cat /etc/hosts; echo ---; cat /etc/resolv.conf; echo ---;"
        "stat -L -c %i /proc/self/ns/net; (: > /etc/hosts) 2>&1 || :",
        network=Network.HOST,
    )

    hosts, resolver, rest = said.split("---\n")
    assert hosts == Path("/etc/hosts").read_text()
    assert resolver == Path("/etc/resolv.conf").read_text()
    assert int(rest.splitlines()[0]) == Path("/proc/self/ns/net").stat().st_ino
    assert "Read-only" in rest


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("", "uid=0(root) gid=0(root) groups=0(root)"),
        ("bob", "uid=1000(bob) gid=1001(bob) groups=1001(bob),44(video)"),
        ("bob:video", "uid=1000(bob) gid=44(video) groups=44(video)"),
        ("7:8", "uid=7 gid=8 groups=8"),
    ],
)
async def test_users(runc, root, user, expected):
    """By name or number, with the groups of the root's own files."""
    assert (await run(runc, root, "id", user=user)).strip() == expected


async def test_an_unknown_user_is_an_error(runc, root):
    """Before anything runs."""
    with pytest.raises(UnknownUserError, match="eve"):
        await run(runc, root, "touch /x", user="eve")
    assert not (root / "x").exists()


async def test_the_working_directory_is_made(runc, root):
    """With all above it, for the user who runs; one within a mount is made there, not in the root."""
    assert await run(runc, root, "echo $PWD; touch here", cwd="/home/bob/work", user="bob") == "/home/bob/work\n"
    assert await run(runc, root, "echo $PWD", cwd="/t/a/b", tmpfs=(TmpfsMount(target="/t"),)) == "/t/a/b\n"

    found = facts(root)
    assert (found["home/bob/work"].uid, found["home/bob/work"].gid, found["home"].uid) == (1000, 1001, 1000)
    assert found["home/bob/work/here"].uid == 1000
    assert not (root / "t").exists()
    with pytest.raises(FileActionError, match="make directory /etc/passwd"):
        await run(runc, root, "true", cwd="/etc/passwd")


async def test_rights_are_the_usual_ones(runc, root):
    """Capabilities as containerd's, no devices but the harmless ones, kernel settings neither shown nor set."""
    said = await run(
        runc,
        root,
        """
        exec 2>&1
        while read -r name value; do
            case $name in CapEff:|CapBnd:|CapInh:|NoNewPrivs:) echo $value;; esac
        done < /proc/self/status
        head -c 4 /dev/zero > /dev/null
        cat /proc/kcore | head -c 1
        mknod /tmp/disk b 254 0; head -c 1 /tmp/disk 2>&1 || echo refused
        (echo 1 > /proc/sys/kernel/panic) 2>&1 || echo refused
        (echo 1 > /sys/x) 2>&1 || echo refused
        """,
    )

    lines = said.splitlines()
    assert lines[:4] == ["0000000000000000", "00000000a80425fb", "00000000a80425fb", "0"]
    assert lines.count("refused") == 3
    assert "Operation not permitted" in said


async def test_no_namespaces_of_its_own(runc, root):
    """Even without the right to, a user namespace would lend a command all rights over more of the kernel."""
    said = await run(
        runc,
        root,
        "unshare -U true 2>&1 || echo refused; unshare -m true 2>&1 || echo refused; echo thread | cat",
        user="bob",
    )

    assert said.count("refused") == 2
    assert "thread" in said


# -- mounts -----------------------------------------------------------------------------------------------


async def test_bind_mounts(runc, root, tmp_path):
    """Directories and files of inputs, found within them; writable only if asked for."""
    given = tmp_path / "input"
    (given / "d").mkdir(parents=True)
    (given / "d/f").write_text("content\n")
    (given / "link").symlink_to("/d")
    (given / "out").symlink_to("../../../../../../../../etc")
    binds = (
        BindMount(target="/whole", input=1),
        BindMount(target="part", input=1, source="link", is_read_only=False),
        BindMount(target="/file", input=1, source="/d/f"),
    )

    said = await run(
        runc,
        root,
        "cat /whole/d/f /file /part/f; echo new > /part/g; (echo x > /whole/x) 2>&1 || :",
        inputs={1: given},
        binds=binds,
    )

    assert said.startswith("content\n" * 3)
    assert "Read-only" in said
    assert (given / "d/g").read_text() == "new\n"
    with pytest.raises(FileActionError, match="bind out/passwd"):
        await run(runc, root, "true", inputs={1: given}, binds=(BindMount(target="/x", input=1, source="out/passwd"),))
    with pytest.raises(FileActionError, match="root is mounted"):
        await run(runc, root, "true", inputs={1: given}, binds=(BindMount(target="/x/..", input=1),))
    with pytest.raises(InternalError, match="input 2"):
        await run(runc, root, "true", inputs={1: given}, binds=(BindMount(target="/x", input=2),))


async def test_mounts_in_mounts(runc, root):
    """The outer one comes first, whatever the order they are written in."""
    said = await run(
        runc,
        root,
        "cat /proc/mounts; touch /t/inner/x /t/x; ls /t",
        caches=(CacheMount(target="/t/inner", id="c"),),
        tmpfs=(TmpfsMount(target="/t", size_bytes=1 << 20),),
    )

    assert "tmpfs /t tmpfs rw,nosuid,nodev,relatime,size=1024k" in said
    assert said.endswith("inner\nx\n")


async def test_hostile_links_keep_mounts_in_the_root(runc, root, tmp_path):
    """A mount's target that is a link out of the root is a path within it."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (root / "out").symlink_to(outside)
    (root / "etc/resolv.conf").symlink_to(outside / "resolv.conf")

    await run(runc, root, "echo x > /out/cache/x", caches=(CacheMount(target="/out/cache", id="c"),), cwd="/out/work")

    assert list(outside.iterdir()) == []
    assert [path.name for path in (root / str(outside).lstrip("/")).iterdir()] == ["work"]


async def test_caches_outlive_commands(runc, root):
    """By ID, with owner and mode from whoever made them; other IDs are other directories."""
    mine = CacheMount(target="/c", id="mine", mode=0o1777, uid=1000, gid=1001)

    await run(runc, root, "touch /c/x", caches=(mine,))

    assert await run(runc, root, "ls /c; stat -c '%a %u %g' /c", caches=(mine,)) == "x\n1777 1000 1001\n"
    assert await run(runc, root, "ls /c", caches=(CacheMount(target="/c", id="other"),)) == ""
    assert "Read-only" in await run(
        runc, root, "touch /c/y 2>&1 || :", caches=(CacheMount(target="/c", id="mine", is_read_only=True),)
    )


@pytest.mark.parametrize("sharing", list(Sharing))
async def test_sharing_of_caches(runc, template, tmp_path, sharing):
    """Shared: both at once in one directory; locked: one after the other; private: both at once, each its own."""
    roots = [Path(shutil.copytree(template, tmp_path / name)) for name in "ab"]
    cache = CacheMount(target="/c", id="c", sharing=sharing)
    first, second = Log(), Log()
    (tmp_path / "gate").mkdir()
    gate = {"inputs": {1: tmp_path / "gate"}, "binds": (BindMount(target="/gate", input=1),)}
    waiting = "echo first > /c/x; echo ready; while [ ! -e /gate/open ]; do sleep 0.05; done"

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(run(runc, roots[0], waiting, log=first, caches=(cache,), **gate))
        await first.until("ready")
        task = tasks.create_task(run(runc, roots[1], "ls /c; echo done", log=second, caches=(cache,)))
        if sharing is Sharing.LOCKED:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.shield(task), 1.0)
            assert second.text == ""
        else:
            await second.until("done")
            assert not (tmp_path / "gate/open").exists()
        (tmp_path / "gate/open").touch()

    assert second.text == ("done\n" if sharing is Sharing.PRIVATE else "x\ndone\n")


async def test_waiting_for_a_cache_ends_with_the_deadline(runc, template, tmp_path):
    """And then nothing has run."""
    roots = [Path(shutil.copytree(template, tmp_path / name)) for name in "ab"]
    cache = CacheMount(target="/c", id="c", sharing=Sharing.LOCKED)
    log = Log()

    holder = asyncio.create_task(run(runc, roots[0], "echo ready; sleep 1000", log=log, caches=(cache,)))
    await log.until("ready")
    with pytest.raises(DeadlineExceededError):
        await run(runc, roots[1], "touch /ran", caches=(cache,), timeout_s=0.5)
    holder.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holder

    assert not (roots[1] / "ran").exists()


# -- secrets -------------------------------------------------------------------------------------------------


SECRET = b"s3cr3t-value-of-the-test"


async def test_secrets_are_files_or_variables(runc, root):
    """With the owner and mode asked for; read-only; never in the root, on a disk or in what is logged."""
    log = Log()
    home = runc._root
    op = {
        "secrets": (
            SecretMount(id="s", target="/run/secrets/s", env="TOKEN", mode=0o440, uid=1000, gid=1001),
            SecretMount(id="absent", target="/run/secrets/absent", env="ABSENT"),
        ),
        "values": {"s": SECRET, "unused": b"x"},
    }

    task = asyncio.create_task(
        run(
            runc,
            root,
            "ls /run/secrets; stat -c '%a %u %g' /run/secrets/s; echo ${#TOKEN} ${ABSENT-unset};"
            "cat /run/secrets/s; echo; echo $TOKEN; (echo x > /run/secrets/s) 2>&1 || :; echo ready; sleep 1000",
            log=log,
            **op,
        )
    )
    await log.until("ready")
    # Without crossing into other file systems: what rests on the disk.
    found = subprocess.run(
        ["find", home, root, "-xdev", "-type", "f", "-exec", "grep", "-l", SECRET.decode(), "{}", "+"],
        capture_output=True,
        text=True,
        check=False,
    )
    kinds = {line.split()[2] for line in Path("/proc/mounts").read_text().splitlines() if str(home) in line}
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert found.stdout == ""
    assert kinds == {"ramfs"}
    lines = log.text.splitlines()
    assert lines[:3] == ["s", "440 1000 1001", f"{len(SECRET)} unset"]
    assert lines[3:5] == ["[redacted]", "[redacted]"]
    assert "Read-only" in lines[5]
    assert SECRET.decode() not in log.text


async def test_secrets_that_can_not_be_given(runc, root):
    """Are errors that never repeat them, before anything runs."""
    with pytest.raises(MissingSecretError, match="'s'"):
        await run(runc, root, "touch /ran", secrets=(SecretMount(id="s", env="S", is_required=True),))
    for value in (b"a\0b", b"\xff"):
        with pytest.raises(UnusableSecretError):
            await run(runc, root, "touch /ran", secrets=(SecretMount(id="s", env="S"),), values={"s": value})
    assert not (root / "ran").exists()


async def test_failures_do_not_repeat_secrets(runc, root):
    """The last lines in the error are those of the log."""
    with pytest.raises(ProcessFailedError) as caught:
        await run(runc, root, "echo $S; exit 3", secrets=(SecretMount(id="s", env="S"),), values={"s": SECRET})

    assert caught.value.last_lines == ("[redacted]",)


# -- what is said ---------------------------------------------------------------------------------------------


async def test_lines_come_as_they_are_said(runc, root):
    """By stream, each whole; one without an end is shown while it is waited for."""
    log = Log()
    (root / "gate").mkdir()

    task = asyncio.create_task(
        run(
            runc,
            root,
            "printf 'really? '; while [ ! -e /gate/open ]; do sleep 0.05; done; echo yes; echo oops >&2",
            log=log,
        )
    )
    await log.until("really? ")
    assert not task.done()
    (root / "gate/open").touch()
    await task

    out = [line for line in log.lines if line.stream is LogStream.STDOUT]
    assert [(line.text, line.is_partial) for line in out] == [("really? ", True), ("yes", False)]
    assert [line.text for line in log.lines if line.stream is LogStream.STDERR] == ["oops"]


async def test_a_slow_reader_slows_the_command(runc, root):
    """Nothing piles up here, and nothing is lost."""
    seen = 0
    most = 0

    async def log(lines):
        nonlocal seen, most
        seen += sum(len(line.text) + (not line.is_partial) for line in lines)
        most = max(most, sum(len(line.text) for line in lines))
        await asyncio.sleep(0)

    await run(runc, root, "head -c 3000000 /dev/zero; echo", log=log)

    assert seen == 3_000_001
    assert most < 1 << 18


async def test_a_sink_that_fails_ends_the_command(runc, root):
    """Its error goes through, and the container is gone."""

    async def log(lines):
        raise UnavailableError("the log", "no answer")

    with pytest.raises(UnavailableError, match="the log"):
        await run(runc, root, f"echo x; sleep {NAP}", log=log)
    assert napping() == []


# -- how it ends -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -TERM $$; exit 9", 9), ("sh -c 'kill -9 $$'", 137)])
async def test_exit_codes(runc, root, script, code):
    """As the shell has them; the error has the last lines."""
    with pytest.raises(ProcessFailedError) as caught:
        await run(runc, root, f"for i in 1 2 3; do echo line $i; done; {script}")

    assert caught.value.exit_code == code
    assert caught.value.command[0] == "/bin/sh"
    assert caught.value.last_lines[:3] == ("line 1", "line 2", "line 3")


@pytest.mark.parametrize(
    ("args", "reason"), [(("nothing-such", "x"), "not found"), (("/etc/passwd", "x"), "permission denied")]
)
async def test_commands_that_can_not_be_started(runc, root, args, reason):
    """Are told from commands that failed, and from nodes that did."""
    with pytest.raises(ProcessNotStartedError, match=reason):
        await run(runc, root, *args)


async def test_processes_left_behind_end_with_the_command(runc, root):
    """Those in the background are no one's."""
    await run(runc, root, f"sleep {NAP} & exit 0")

    assert napping() == []


async def test_cancellation_kills_the_whole_container(runc, root):
    """All its processes are gone when the call returns, and so is what was made for it."""
    log = Log()
    task = asyncio.create_task(
        run(runc, root, f"trap '' TERM INT; sleep {NAP} & echo ready; wait; sleep {NAP}", log=log)
    )
    await log.until("ready")

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert napping() == []


async def test_cancellation_at_any_time(runc, root):
    """While it is prepared, while it starts, while it runs: nothing is left, ever."""
    for step in range(0, 24, 2):
        task = asyncio.create_task(run(runc, root, f"sleep {NAP}"))
        for _ in range(step):
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert napping() == []
        assert list((runc._root / "bundles").glob("*")) == []
        assert list((runc._root / "runc").glob("*")) == []
    assert facts(root)["."].kind == "directory"
    assert not (root / "proc").exists()


async def test_the_deadline_kills_the_container(runc, root):
    """The error says so."""
    with pytest.raises(DeadlineExceededError, match="within 1 s"):
        await run(runc, root, f"sleep {NAP}", timeout_s=1.0)

    assert napping() == []


# -- limits -------------------------------------------------------------------------------------------------------


def needs(controller):
    is_there = os.geteuid() == 0 and controller in Cgroups().controllers
    return pytest.mark.skipif(not is_there, reason=f"no writable {controller} cgroup here")


@needs("memory")
async def test_out_of_memory_is_told_apart(runc, root):
    """From a command that failed, or was killed, by itself."""
    limits = Limits(memory_bytes=32 << 20)
    # Named to the kernel as what to kill: where memory is slow to come back, it takes the shell as well.
    survived = "(echo 1000 > /proc/self/oom_score_adj; head -c 300000000 /dev/zero | tail > /dev/null) || echo survived"

    with pytest.raises(ProcessOutOfMemoryError, match="out of memory"):
        await run(runc, root, "head -c 300000000 /dev/zero | tail > /dev/null; exit 5", limits=limits)
    with pytest.raises(ProcessFailedError) as caught:
        await run(runc, root, "sh -c 'kill -9 $$'", limits=limits)
    assert type(caught.value) is ProcessFailedError
    assert await run(runc, root, survived, limits=limits)


@needs("pids")
async def test_processes_are_limited(runc, root):
    """A fork bomb ends by itself."""
    with pytest.raises(ProcessFailedError) as caught:
        await run(runc, root, "for i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 60 & done", limits=Limits(pids=6))

    assert any("fork" in line for line in caught.value.last_lines)


@needs("cpu")
async def test_cpus_are_limited(runc, root):
    """Half a CPU is a quota of half a period."""
    group = Cgroups()._groups
    log = Log()
    task = asyncio.create_task(run(runc, root, "echo ready; sleep 1000", log=log, limits=Limits(cpus=0.5)))
    await log.until("ready")
    container = next(path.name for path in (runc._root / "runc").iterdir())
    if "" in group:
        quota, period = (group[""] / container / "cpu.max").read_text().split()
    else:
        quota, period = ((group["cpu"] / container / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert int(quota) * 2 == int(period)


async def test_a_limit_that_can_not_be_kept_is_refused(runc, root, monkeypatch):
    """Nothing runs without it."""
    monkeypatch.setattr("storage.containers.cgroups._made", lambda above: {})

    with pytest.raises(LimitUnavailableError, match="memory"):
        await run(runc, root, "touch /ran", limits=Limits(memory_bytes=1 << 30))
    assert not (root / "ran").exists()


async def test_without_cgroups_devices_can_not_be_made(runc, root, monkeypatch):
    """Commands run all the same, but nothing else would keep them from this machine's disks."""
    monkeypatch.setattr("storage.containers.cgroups._made", lambda above: {})

    said = await run(runc, root, "mknod /tmp/disk b 254 0 2>&1 || echo refused")

    assert said.endswith("refused\n")


# -- nodes that can't, processes that die ------------------------------------------------------------------------------


async def test_without_runc_the_error_says_what_to_do(root, tmp_path):
    """And it is no fault of the command."""
    with pytest.raises(RuntimeMissingError) as caught:
        await run(Runc(tmp_path, command="/nothing/runc"), root, "true")

    assert "apt-get install runc" in caught.value.hint


async def test_a_runtime_that_fails_is_the_nodes_fault(root, tmp_path):
    """Not the command's: another node may well run it."""
    fake = tmp_path / "runc"
    fake.write_text("#!/bin/sh\ncase $* in *delete*) exit 0;; esac\nexit 4\n")
    fake.chmod(0o755)

    with pytest.raises(ContainerError, match="exit code 4"):
        await run(Runc(tmp_path / "home", command=str(fake)), root, "true")


async def test_a_cancellation_is_one_even_if_nothing_can_be_removed(root, tmp_path):
    """Whoever cancels waits for that and for nothing else; what is left is told by what recovers."""
    fake = tmp_path / "runc"
    fake.write_text(
        f"#!/bin/sh\ncase $* in *run*--bundle*) echo ready; exec sleep {NAP};; esac\necho stuck >&2; exit 1\n"
    )
    fake.chmod(0o755)
    runc = Runc(tmp_path / "home", command=str(fake))
    log = Log()
    task = asyncio.create_task(run(runc, root, "true", log=log))
    await log.until("ready")

    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert napping() == []
    assert list((tmp_path / "home/bundles").iterdir()) == []


def test_what_a_killed_process_leaves_is_removed(runc, root, tmp_path):
    """Its containers, their processes and what was made for them; a live process's are left alone."""
    script = f"""
import asyncio, sys
from pathlib import Path
from cluster.graph import RunOp, SecretMount
from storage.containers.runc import Runc

async def log(lines):
    print("ready", flush=True)

op = RunOp(args=("/bin/sh", "-c", "echo ready; sleep {NAP}"), secrets=(SecretMount(id="s", target="/s", env="S"),))
asyncio.run(Runc(Path({str(runc._root)!r})).run(
    op, Path({str(root)!r}), binds={{}}, secrets={{"s": b"value"}}, log=log, timeout_s=100))
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        assert runc.recover() == []
        process.send_signal(signal.SIGKILL)

    [removed] = runc.recover()

    assert len(removed) == 32
    assert napping() == []
    assert runc.recover() == []


async def test_a_container_that_could_not_be_removed_is_found_later(runc, root, tmp_path):
    """By the runtime's own records, where its bundle is gone already."""
    log = Log()
    real = shutil.which("runc") or "/usr/sbin/runc"
    fake = tmp_path / "fake"
    fake.write_text(f'#!/bin/sh\ncase $* in *delete*) echo busy >&2; exit 1;; esac\nexec {real} "$@"\n')
    fake.chmod(0o755)

    with pytest.raises(ContainerError, match="busy"):
        await run(Runc(runc._root, command=str(fake)), root, "echo done", log=log)

    assert log.text == "done\n"
    assert len(runc.recover()) == 1
    assert runc.recover() == []


async def test_records_of_the_runtime_have_no_secrets(runc, root):
    """Its state is on the disk while a container runs; the configuration is not."""
    log = Log()
    task = asyncio.create_task(
        run(
            runc, root, "echo ready; sleep 1000", log=log, secrets=(SecretMount(id="s", env="S"),), values={"s": SECRET}
        )
    )
    await log.until("ready")
    [state] = (runc._root / "runc").glob("*/state.json")
    text = state.read_text()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert json.loads(text)["id"] == state.parent.name
    assert SECRET.decode() not in text
