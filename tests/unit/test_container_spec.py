"""What is told to the runtime, and what is shown of what a command says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.graph import Limits, Network, RunOp, SecretMount
from storage.containers.logs import MAX_LINE_BYTES, LineReader, LogLine, LogStream, Redactor
from storage.containers.seccomp import profile
from storage.containers.secrets import environment
from storage.containers.secrets import given as secrets_given
from storage.containers.spec import DEFAULT_PATH, bind, runtime_spec, tmpfs
from storage.containers.users import ProcessUser


def spec(**options):
    wanted = {
        "args": ("true",),
        "env": {},
        "cwd": "/",
        "user": ProcessUser(),
        "root": Path("/root"),
        "mounts": (),
        "cgroup": "lazyfarm/x",
    }
    return runtime_spec(**(wanted | options))


# -- the specification ---------------------------------------------------------------------------------


def test_a_command_has_what_buildkit_gives_it():
    """No terminal, privileges may be gained, the usual umask; PATH only where there is none."""
    process = spec(args=("a", "b"), env={"X": "1"}, cwd="/w", user=ProcessUser(uid=1, gid=2, groups=(2, 3)))["process"]

    assert process["args"] == ["a", "b"]
    assert process["env"] == [f"PATH={DEFAULT_PATH}", "X=1"]
    assert process["user"] == {"uid": 1, "gid": 2, "additionalGids": [2, 3], "umask": 0o022}
    assert not process["terminal"]
    assert not process["noNewPrivileges"]
    assert spec(env={"PATH": "/p"})["process"]["env"] == ["PATH=/p"]


def test_no_capability_is_inherited_or_ambient():
    """Inheritable ones would outlive a change of user (CVE-2022-24769)."""
    capabilities = spec()["process"]["capabilities"]

    assert set(capabilities) == {"bounding", "effective", "permitted"}
    assert "CAP_SYS_ADMIN" not in capabilities["bounding"]
    assert "CAP_MKNOD" in capabilities["bounding"]


def test_without_a_cgroup_there_is_no_making_of_devices():
    """The device cgroup is what keeps them harmless."""
    made = spec(cgroup=None)

    assert "CAP_MKNOD" not in made["process"]["capabilities"]["bounding"]
    assert "cgroupsPath" not in made["linux"]
    assert "resources" not in made["linux"]
    assert not [mount for mount in made["mounts"] if mount["type"] == "cgroup"]


@pytest.mark.parametrize(("network", "is_own"), [(Network.NONE, True), (Network.HOST, False)])
def test_network(network, is_own):
    """None is a namespace of its own, host is none."""
    types = {namespace["type"] for namespace in spec(network=network)["linux"]["namespaces"]}

    assert types - {"network"} == {"pid", "ipc", "uts", "mount", "cgroup"}
    assert ("network" in types) == is_own


def test_limits():
    """Swap counts as memory; a CPU is a period's quota; no limit is no entry; devices are always refused."""
    made = spec(limits=Limits(memory_bytes=1 << 20, cpus=1.5, pids=7))["linux"]["resources"]

    assert made["memory"] == {"limit": 1 << 20, "swap": 1 << 20}
    assert made["cpu"] == {"quota": 150_000, "period": 100_000}
    assert made["pids"] == {"limit": 7}
    assert spec()["linux"]["resources"] == {"devices": [{"allow": False, "access": "rwm"}]}


def test_denied_system_calls():
    """For each machine that runs 32-bit programs, those too; on one that isn't known, none."""
    known = profile("x86_64")

    assert known["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    assert "unshare" in known["syscalls"][0]["names"]
    assert profile("unheard-of") is None


def test_mounts_come_after_the_systems_and_by_depth():
    """So that none hides another; of one depth, as they are written."""
    mounts = (
        tmpfs("/a/b/c", size_bytes=0),
        bind("/src", "/a", is_read_only=True),
        tmpfs("/b", size_bytes=5),
        bind("/src", "/dev/x", is_read_only=False, extra=("nosuid",)),
    )
    made = spec(mounts=mounts)["mounts"]

    assert [mount["destination"] for mount in made[-4:]] == ["/a", "/b", "/dev/x", "/a/b/c"]
    assert [mount["options"] for mount in made[-4:]] == [
        ["bind", "ro"],
        ["nosuid", "nodev", "size=5"],
        ["bind", "rw", "nosuid"],
        ["nosuid", "nodev"],
    ]
    assert {"/proc", "/dev", "/sys"} <= {mount["destination"] for mount in made[:-4]}


def test_secrets_that_are_given():
    """Optional ones may be absent; a file alone is no variable."""
    op = RunOp(
        args=("x",),
        secrets=(SecretMount(id="a", env="A"), SecretMount(id="b", env="B"), SecretMount(id="c", target="/c")),
    )

    found = secrets_given(op, {"a": b"1", "c": b"3", "unasked": b"4"})

    assert [(mount.id, value) for mount, value in found] == [("a", b"1"), ("c", b"3")]
    assert environment(found) == {"A": "1"}


# -- lines ---------------------------------------------------------------------------------------------


def read(*pieces, secrets=()):
    reader = LineReader(LogStream.STDOUT, secrets)
    lines = [line for piece in pieces for line in reader.feed(piece)]
    return [(line.text, line.is_partial) for line in lines + reader.end()]


def test_lines_are_whole_however_they_come():
    """Line ends of either kind; the last line needs none."""
    assert read(b"a\nb", b"c\r\n", b"\n", b"d") == [("a", False), ("bc", False), ("", False), ("d", False)]
    assert read() == []


def test_long_lines_come_in_pieces():
    """Each bounded, and never cut within a character."""
    line = "é" * MAX_LINE_BYTES

    for pieces in ([f"x{line}\n".encode()], [f"x{line}".encode(), b"\n"], [b"x", line.encode()]):
        found = read(*pieces)
        assert "".join(text for text, _ in found) == "x" + line
        assert all(len(text.encode()) <= MAX_LINE_BYTES for text, _ in found)
        assert [is_partial for _, is_partial in found] == [True] * (len(found) - 1) + [False]


def test_what_is_no_utf8_is_replaced():
    """Nothing a command says can't be shown."""
    assert read(b"a\xff\xfeb\n") == [("a\ufffd\ufffdb", False)]


def test_a_line_without_an_end_can_be_shown_early():
    """The rest of it comes by itself."""
    reader = LineReader(LogStream.STDERR, ())

    assert reader.feed(b"really? ") == []
    assert reader.has_rest
    assert reader.flush() == [LogLine(LogStream.STDERR, "really? ", is_partial=True)]
    assert reader.flush() == []
    assert reader.feed(b"yes\n") == [LogLine(LogStream.STDERR, "yes")]


@pytest.mark.parametrize(
    ("secret", "said", "shown"),
    [
        (b"hunter2", b"it is hunter2!", b"it is [redacted]!"),
        (b"hunter2\n", b"it is hunter2!", b"it is [redacted]!"),
        (b"one\ntwo three\n}\n", b"two three; one; }", b"[redacted]; one; }"),
        (b"", b"all", b"all"),
        (b" \n", b"a \n", b"a \n"),
        (b"a.c", b"abc a.c", b"abc [redacted]"),
        (b"hunter2", b"hunter", b"hunter"),
    ],
)
def test_secrets_are_taken_out(secret, said, shown):
    """Whole, without white space around, and by their longer lines."""
    redactor = Redactor([secret])

    assert redactor.feed(said) + redactor.end() == shown


def test_of_two_secrets_the_longer_one_goes():
    """Even if its beginning, itself a secret, came before."""
    redactor = Redactor([b"abc", b"abcdef"])

    assert redactor.feed(b"-abc") == b"-"
    assert redactor.feed(b"def-") == b"[redacted]-"
    assert redactor.feed(b"abcd") + redactor.end() == b"[redacted]d"


@given(
    secrets=st.lists(st.text("xyz", min_size=1, max_size=6).map(str.encode), min_size=1, max_size=4),
    pieces=st.lists(st.text("xyz-", max_size=8).map(str.encode), max_size=12),
)
def test_no_cut_lets_a_secret_through(secrets, pieces):
    """However a stream is cut; and what is no secret is all there."""
    redactor = Redactor(secrets)

    shown = b"".join(redactor.feed(piece) for piece in pieces) + redactor.end()

    assert not any(secret in shown for secret in secrets)
    kept = re.escape(shown).replace(re.escape(b"[redacted]"), b"[xyz]+")
    assert re.fullmatch(kept, b"".join(pieces))
