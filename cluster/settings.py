"""What one farm is set to: what was asked for, and what runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from cluster.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What ``lazyfarm up`` started or found: enough to join the farm by its state directory alone.

    Names files that hold secrets, never a secret.
    """

    #: UUID that marks every process the farm starts.
    farm_id: str
    #: The configuration it was brought up with; None: defaults. Read again by every later command.
    config_file: Path | None = None
    #: ``farm.name`` it was brought up under: part of every Redis key and the Ray namespace.
    farm_name: str
    redis_url: str
    #: "" for a server without one.
    redis_password_file: str = ""
    s3_endpoint: str
    s3_region: str
    s3_bucket: str
    #: "" for boto3's own chain.
    s3_credentials_file: str = ""
    #: ``HOST:PORT`` of the GCS.
    ray_address: str
    #: "" for a cluster without one.
    ray_token_file: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FarmSettings:
    """A farm's state directory and its checked configuration."""

    #: Absolute.
    state_dir: Path
    #: What was asked for: defaults, the file, the environment. ``redis.url == ""`` means that the farm
    #: starts its own: this is what ``up`` goes by.
    wanted: Config
    #: The file it was read from; None: none.
    config_file: Path | None = None
    #: None: ``up`` was never finished here, or ``down`` was.
    running: Running | None = None

    @property
    def config(self) -> Config:
        """Return what holds: *wanted*, with the addresses of what runs filled in.

        What runs wins over the file and the environment: an edited ``redis.url`` takes effect with the
        next ``up``, not by splitting the farm in two.
        """
        running = self.running
        if running is None:
            return self.wanted
        wanted = self.wanted
        return replace(
            wanted,
            farm=replace(wanted.farm, name=running.farm_name),
            redis=replace(wanted.redis, url=running.redis_url, password_file=running.redis_password_file),
            s3=replace(
                wanted.s3,
                endpoint=running.s3_endpoint,
                region=running.s3_region,
                bucket=running.s3_bucket,
                credentials_file=running.s3_credentials_file,
            ),
            ray=replace(wanted.ray, address=running.ray_address, token_file=running.ray_token_file),
        )
