"""The layout of a farm's state directory: what is kept where, and with which rights."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import DeadlineExceededError, StartError
from storage.services.file_lock import locked_file

_FARM_ID = "farm-id"
#: Everything that a farm keeps in its directory, by name; what else is there is somebody else's.
_OWN = ("farm.toml", "secrets", "run", "logs", "redis", "s3", "ray", "nodes", "node-root")


@dataclass(frozen=True, slots=True)
class StateDir:
    """Paths under one state directory.

    ``run/`` holds process records and locks, ``logs/`` what processes print, ``secrets/`` (0700) one
    file a secret (0600), and one directory a service its data.
    """

    root: Path

    def claim(self) -> None:
        """Make this directory a farm's, unless it is one: from then on the names in it that a farm uses are its own.

        Raises:
            StartError: something that no farm made has one of these names, and ``purge`` would remove it; or the
                directory can't be made.
        """
        if self.known_farm_id() is not None:
            return
        taken = [name for name in _OWN if os.path.lexists(self.root / name)]
        # Asked again: another command may have claimed it, and begun, in between.
        if taken and self.known_farm_id() is None:
            raise StartError(
                "the farm", f"{self.root} holds {', '.join(taken)}, which no farm made: name another directory", ""
            )
        try:
            self.farm_id()
        except OSError as exc:
            raise StartError("the farm", f"{self.root} can't be written to: {exc.strerror}", "") from exc

    def purge(self) -> list[str]:
        """Remove what the farm keeps here, and the directory where that leaves it empty; nothing runs.

        Returns:
            Names of what is left, because it is not the farm's or can't be removed; nothing is done where no farm was.
        """
        if self.known_farm_id() is None:
            return []
        # What names the directory as a farm's goes last: a purge that was ended can be made again.
        for name in (*_OWN, _FARM_ID):
            for path in (self.root / name, *self.root.glob(f".{name}.*")):  # drafts that a crash left, too
                _remove(path)
        with suppress(OSError):  # not empty
            self.root.rmdir()
        return sorted(path.name for path in self.root.iterdir()) if self.root.is_dir() else []

    def create(self) -> None:
        """Make the directories that are missing."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.run.mkdir(exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        self.secrets.mkdir(mode=0o700, exist_ok=True)

    @property
    def run(self) -> Path:
        """Return where process records and locks are."""
        return self.root / "run"

    @property
    def logs(self) -> Path:
        """Return where processes print to."""
        return self.root / "logs"

    @property
    def secrets(self) -> Path:
        """Return where secrets are, one a file."""
        return self.root / "secrets"

    def farm_id(self) -> str:
        """Return the farm's UUID, made on first use: it marks every process the farm starts."""
        path = self.root / _FARM_ID
        if (known := _read_text(path)) is not None:
            return known
        return create_once(path, lambda: str(uuid.uuid4()))

    def known_farm_id(self) -> str | None:
        """Return the farm's UUID, or None where no farm was ever started here."""
        return _read_text(self.root / _FARM_ID)

    def secret_file(self, name: str, make: Callable[[], str]) -> Path:
        """Return the file of secret *name*, filled by *make* on first use; readable by its owner only."""
        path = self.secrets / name
        if not path.exists():
            create_once(path, make)
        return path

    @contextmanager
    def lock(self, name: str, *, deadline_s: float) -> Iterator[None]:
        """Hold ``run/NAME.lock``, so that two commands don't start or stop one service at once.

        The kernel drops the lock with the process, so a killed command leaves none behind.

        Raises:
            DeadlineExceededError: another process held it for *deadline_s* seconds.
        """
        self.create()
        too_late = DeadlineExceededError(
            f"{name} of {self.root}", f"another command has been starting or stopping it for {deadline_s:.0f} s"
        )
        with locked_file(self.run / f"{name}.lock", deadline_s=deadline_s, too_late=too_late):
            yield


def random_secret() -> str:
    """Return 256 random bits as text."""
    return secrets.token_urlsafe(32)


def create_once(path: Path, make: Callable[[], str]) -> str:
    """Fill *path* (0600) with what *make* returns, unless it exists; return its text. Whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.") as draft:  # made with mode 0600
        draft.write(make())
        draft.flush()
        with suppress(FileExistsError):
            os.link(draft.name, path)  # unlike a rename, never replaces what another process made first
    return path.read_text().strip()


def write_atomic(path: Path, text: str, mode: int = 0o600) -> None:
    """Replace *path* by *text*: readers see the old or the new, never a part."""
    fd, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, "w") as out:
            out.write(text)
        os.chmod(draft, mode)  # noqa: PTH101 - a path given as text by mkstemp
        os.replace(draft, path)  # noqa: PTH105 - likewise
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def _remove(path: Path) -> None:
    """Remove a file, a link, or a directory with all that is in it; what can't be stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (FileNotFoundError, NotADirectoryError):
        return None
