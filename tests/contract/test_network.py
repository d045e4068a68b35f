"""The network that tests cut: silent where it is to be silent, and as before when it is over."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.doubles.network import cut_off, refused, silenced

pytestmark = [pytest.mark.root, pytest.mark.skipif(os.geteuid() != 0, reason="cgroups and packet filters need root")]

#: Talks over a connection that it has, or a new one, as it is told; says what came of it.
_PEER = """
import socket, sys
port = int(sys.argv[1])
old = socket.create_connection(("127.0.0.1", port))
old.settimeout(0.4)
for line in sys.stdin:
    try:
        one = old if line == "old\\n" else socket.create_connection(("127.0.0.1", port), timeout=0.4)
        one.sendall(b"x")
        print(one.recv(1).decode(), flush=True)
    except OSError as exc:
        print(type(exc).__name__, flush=True)
"""


@dataclass
class Peer:
    """A process that talks to a server of this one."""

    process: subprocess.Popen[str]
    port: int

    def says(self, line: str) -> str:
        """Tell it to talk; return what came of it."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture
def peer() -> Iterator[Peer]:
    """A process with a connection to an echo server."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        threading.Thread(target=_serve, args=(server,), daemon=True).start()
        program = [sys.executable, "-c", _PEER, str(port)]
        with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            found = Peer(process, port)
            assert [found.says("old"), found.says("new")] == ["x", "x"]
            yield found
            process.kill()
        server.shutdown(socket.SHUT_RDWR)


def _serve(server: socket.socket) -> None:
    while True:
        try:
            one, _ = server.accept()
        except OSError:
            return
        threading.Thread(target=_echo, args=(one,), daemon=True).start()


def _echo(one: socket.socket) -> None:
    with one:
        try:
            while data := one.recv(64):
                one.sendall(data)
        except OSError:
            return


def test_a_process_that_is_cut_off_hears_nothing_and_keeps_its_connections(peer: Peer):
    """Neither by a connection that it has nor by a new one; afterwards the old one goes on where it was."""
    with cut_off(peer.process.pid):
        assert [peer.says("old"), peer.says("new")] == ["TimeoutError", "TimeoutError"]
    assert peer.says("new") == "x"
    assert peer.says("old") == "x"


def test_a_port_that_is_silenced_answers_nobody(peer: Peer):
    """Without a word, on old connections and new ones."""
    with silenced(peer.port):
        assert [peer.says("old"), peer.says("new")] == ["TimeoutError", "TimeoutError"]
    assert peer.says("new") == "x"


def test_a_port_that_is_refused_resets_everybody(peer: Peer):
    """At once, as a dead process's would."""
    with refused(peer.port):
        assert peer.says("old") in {"ConnectionResetError", "BrokenPipeError"}
        assert peer.says("new") == "ConnectionRefusedError"
    assert peer.says("new") == "x"
