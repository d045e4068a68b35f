"""The farm as its users see it: the command line and driver scripts, each a process of its own."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

_COMMAND_TIMEOUT_S = 240.0
_DRIVER_TIMEOUT_S = 240.0
_ROOT = Path(__file__).parents[2]


class CommandFailedError(Exception):
    """A ``lazyfarm`` command failed; says what it said."""


class DriverFailedError(Exception):
    """A driver process failed; says what it said."""


class FarmProcesses:
    """Runs commands and drivers against the farm of one state directory."""

    def __init__(self, state_dir: Path, logs: Path) -> None:
        self.state_dir = state_dir
        self._logs = logs
        self._drivers: list[Driver] = []
        logs.mkdir(parents=True, exist_ok=True)

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """Return the environment of a user of this farm, whatever farm the caller's own names."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("LAZYFARM_")}
        return {**inherited, "LAZYFARM_STATE_DIR": str(self.state_dir), **(more or {})}

    def cli(self, *arguments: str, may_fail: bool = False, timeout_s: float = _COMMAND_TIMEOUT_S) -> dict[str, Any]:
        """Run ``lazyfarm ARGUMENTS --json`` and return its document.

        Args:
            arguments: The command and its arguments.
            may_fail: Return the document of a failure too (``status`` of a farm that lacks something).
            timeout_s: Seconds until it is given up.

        Raises:
            CommandFailedError: it failed, or took too long.
        """
        command = [str(Path(sys.executable).with_name("lazyfarm")), *arguments, "--json"]
        try:
            done = subprocess.run(
                command,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=timeout_s,
            )
        except subprocess.TimeoutExpired as error:
            raise CommandFailedError(f"lazyfarm {' '.join(arguments)}: no end after {timeout_s:.0f} s") from error
        if done.returncode != 0 and not (may_fail and done.stdout):
            said = (done.stderr.strip() or done.stdout.strip())[-2000:]
            raise CommandFailedError(f"lazyfarm {' '.join(arguments)}: exit {done.returncode}: {said}")
        document: dict[str, Any] = json.loads(done.stdout)
        return document

    def driver(
        self,
        do: str,
        subject: str,
        *options: str,
        node: str | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Driver:
        """Start a driver process (see :mod:`tests.demo.driver`)."""
        return self.process(
            "tests.demo.driver",
            do,
            subject,
            *options,
            *(["--node", node] if node else []),
            environment=environment,
        )

    def process(self, module: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Driver:
        """Start a module that says what it has to say in lines of JSON, the first one once it is ready."""
        command = [sys.executable, "-m", module, *arguments]
        log = self._logs / f"driver-{len(self._drivers)}.log"
        with log.open("wb") as errors:
            process = subprocess.Popen(
                command,
                cwd=_ROOT,
                env=self.environment(environment),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        driver = Driver(process, log)
        self._drivers.append(driver)
        return driver

    def close(self) -> None:
        """End every driver that is still there."""
        for driver in self._drivers:
            driver.kill()


class Driver:
    """A driver process: ready, let go, done."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process = process
        self._log = log
        self._lines: queue.Queue[str] = queue.Queue()
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin: IO[str] = process.stdin
        threading.Thread(target=self._read, args=(process.stdout,), daemon=True).start()

    @property
    def pid(self) -> int:
        """Return the process ID."""
        return self._process.pid

    def wait_ready(self) -> dict[str, Any]:
        """Wait until it has its ref and waits at the barrier."""
        return self.said("ready")

    def go(self) -> None:
        """Let it go."""
        self._stdin.write("go\n")
        self._stdin.flush()

    def result(self) -> dict[str, Any]:
        """Wait for its end and return its result."""
        result = self.said("layers")
        self._process.wait(_DRIVER_TIMEOUT_S)
        return result

    def said(self, key: str) -> dict[str, Any]:
        """Wait for the next line, which has *key*, and return it.

        Raises:
            DriverFailedError: it said something else, or nothing for too long.
        """
        try:
            line = self._lines.get(timeout=_DRIVER_TIMEOUT_S)
        except queue.Empty:
            raise DriverFailedError(f"driver {self.pid} said nothing for {_DRIVER_TIMEOUT_S:.0f} s") from None
        if not line:
            raise DriverFailedError(f"driver {self.pid} ended: {self._log.read_text()[-2000:].strip()}")
        said: dict[str, Any] = json.loads(line)
        if "error" in said:
            raise DriverFailedError(f"driver {self.pid}: {said['error']['type']}: {said['error']['message']}")
        assert key in said, line
        return said

    def end(self) -> None:
        """Tell it that nothing more comes, and wait for its end."""
        self._stdin.close()
        self._process.wait(_DRIVER_TIMEOUT_S)

    def kill(self) -> None:
        """End it now, if it is still there."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()

    def _read(self, stdout: IO[str]) -> None:
        for line in stdout:
            self._lines.put(line)
        self._lines.put("")
