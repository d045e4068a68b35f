"""A farm's gateway as a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from lazyfarm.farm import Farm
from lazyfarm.gateway.server import token_file
from tests.doubles.farm import RunningFarm
from tests.doubles.redis import free_port
from tests.doubles.registry import Authority


class Gateway:
    """``lazyfarm gateway`` as a process, and what a driver outside knows of it."""

    def __init__(self, farm: RunningFarm, authority: Authority) -> None:
        self._farm = farm
        self._authority = authority
        self._port = free_port()
        self._process: subprocess.Popen[str] | None = None
        self.environ = {
            "LAZYFARM_URL": f"https://127.0.0.1:{self._port}",
            "LAZYFARM_TOKEN_FILE": str(token_file(farm.state_dir)),
            "LAZYFARM_CA_FILE": str(authority.ca_file),
        }

    def start(self) -> None:
        """Start it, and wait until it listens."""
        listening = {
            "LAZYFARM__GATEWAY__PORT": str(self._port),
            "LAZYFARM__GATEWAY__CERT_FILE": str(self._authority.certificate),
            "LAZYFARM__GATEWAY__KEY_FILE": str(self._authority.key),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lazyfarm", "gateway", "--state-dir", str(self._farm.state_dir)],
            env={**os.environ, **self._farm.environ, **listening},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout.readline() == f"gateway: {self.environ['LAZYFARM_URL']}\n"

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it by a signal."""
        assert self._process is not None
        assert self._process.stdout is not None
        self._process.send_signal(number)
        assert self._process.wait(timeout=30) == (0 if number is signal.SIGTERM else -number)
        self._process.stdout.close()

    def forget_peak(self) -> None:
        """From here on, what it has now is the most that it had."""
        Path(f"/proc/{self._process.pid}/clear_refs").write_text("5")

    def peak_kib(self) -> int:
        """Return the KiB of memory that it had at most."""
        status = Path(f"/proc/{self._process.pid}/status").read_text()
        return int(re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)[1])

    async def connect(self, credentials: Mapping[str, tuple[str, str]] | None = None) -> Farm:
        """Connect as a driver outside."""
        return await Farm.connect(
            self.environ["LAZYFARM_URL"],
            token_file=self.environ["LAZYFARM_TOKEN_FILE"],
            ca_file=self.environ["LAZYFARM_CA_FILE"],
            credentials=credentials or {},
        )
