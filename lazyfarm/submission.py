"""Driver scripts as jobs of the farm's own Ray: submitted, followed, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cluster.errors import FarmNotRunningError, InvalidArgumentError, UnavailableError
from cluster.settings import FarmSettings

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

T = TypeVar("T")

#: Seconds for which Ray may take to say what became of a job whose log has ended, and between looks.
_SETTLE_S = 20.0
_LOOK_S = 0.2
#: What Ray asks in place of the address that it is given: set for its own command line, and in each of its jobs.
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
#: Held while they are put aside.
_ASIDE = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A driver script, as a job of Ray's."""

    id: str
    #: Ray's own word: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``FAILED``, ``STOPPED``.
    status: str
    #: Of the script; None while it runs, and where it never ran.
    exit_code: int | None = None
    #: What Ray says of it, for people.
    message: str = ""


async def submit(
    settings: FarmSettings,
    script: str,
    arguments: Sequence[str] = (),
    *,
    working_dir: Path,
    environment: Mapping[str, str] | None = None,
    submission_id: str | None = None,
    address: str = "",
    on_log: Callable[[str], object] | None = None,
) -> Submitted:
    """Run a driver script on the farm's head, with the Python that the farm runs with.

    Args:
        settings: The farm.
        script: The script's path, from *working_dir* on.
        arguments: What it is called with. No secrets: Ray keeps and shows them.
        working_dir: Is sent along, and is where the script runs. No secrets in it either.
        environment: Variables of the script, which Ray keeps and shows likewise.
        submission_id: A name for the job; None: Ray's choice.
        address: Its job server, as this machine reaches it; "": the one that *settings* know of.
        on_log: Told of what it prints, until it has ended; None: it is not waited for. A cancelled call stops the job.

    Raises:
        FarmNotRunningError: the farm is not up, or takes no jobs.
        InvalidArgumentError: there is no such script, or Ray refuses what is asked.
        UnavailableError: its job server does not answer.
    """
    url = address or (settings.running.ray_jobs_url if settings.running else "")
    if not url:
        raise FarmNotRunningError(
            str(settings.state_dir),
            "its Ray takes no jobs that it knows of: see ray.dashboard, or use `ray job submit`",
        )
    if not (working_dir / script).is_file():
        raise InvalidArgumentError("script", script, f"there is no such file in {working_dir}")
    from actors.join import set_ray_environment  # noqa: PLC0415 - Ray takes two seconds to import

    set_ray_environment(settings.config)
    client = await _asked(url, lambda: _client(url))
    runtime_env = {"working_dir": str(working_dir), "env_vars": dict(environment or {})}
    job = await _asked(
        url,
        lambda: client.submit_job(
            entrypoint=shlex.join(["python", script, *arguments]), submission_id=submission_id, runtime_env=runtime_env
        ),
    )
    if on_log is None:
        return Submitted(id=job, status="PENDING")
    try:
        with _translated(url):
            async for text in client.tail_job_logs(job):
                on_log(text)
        return await _ended(url, client, job)
    except asyncio.CancelledError:
        with contextlib.suppress(UnavailableError, InvalidArgumentError):
            await asyncio.shield(_asked(url, lambda: client.stop_job(job)))
        raise


async def _ended(url: str, client: JobSubmissionClient, job: str) -> Submitted:
    """Wait until Ray says what became of a job."""
    give_up_s = time.monotonic() + _SETTLE_S
    while not (info := await _asked(url, lambda: client.get_job_info(job))).status.is_terminal():
        if time.monotonic() > give_up_s:
            break
        await asyncio.sleep(_LOOK_S)
    return Submitted(id=job, status=str(info.status), exit_code=info.driver_exit_code, message=info.message or "")


def _client(url: str) -> JobSubmissionClient:
    """Return a client of the job server there, and of no other, whatever the environment names."""
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415 - as above

    with _ASIDE:
        aside = {name: os.environ.pop(name) for name in _OVERRIDING if name in os.environ}
        try:
            return JobSubmissionClient(url)
        finally:
            os.environ.update(aside)


async def _asked(url: str, ask: Callable[[], T]) -> T:
    """Ask Ray's job server, on a thread; its errors become ours."""
    with _translated(url):
        return await asyncio.to_thread(ask)


@contextlib.contextmanager
def _translated(url: str) -> Iterator[None]:
    """Turn what Ray's client raises in the body into our errors."""
    import aiohttp  # noqa: PLC0415 - as above
    from ray.exceptions import RayError  # noqa: PLC0415 - likewise

    try:
        yield
    except (OSError, aiohttp.ClientError) as exc:
        # OSError: that a connection broke, in Python's words or in those of `requests`.
        raise UnavailableError("the farm's job server", _first_line(exc)) from exc
    except (RayError, RuntimeError, ValueError) as exc:
        raise InvalidArgumentError("job", f"for {url}", _first_line(exc)) from exc


def _first_line(exc: BaseException) -> str:
    return next((line.strip() for line in str(exc).splitlines() if line.strip()), type(exc).__name__)
