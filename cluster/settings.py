"""What one farm is set to: what was asked for, and what runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from cluster.config import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """What ``lazyfarm up`` started or found: enough to join the farm by its state directory alone.

    Names files that hold secrets, never a secret.
    """

    #: UUID that marks every process the farm starts.
    farm_id: str
    #: The file named when it was brought up; None: none. Read again by the next ``up``, and by nothing else.
    config_file: Path | None = None
    #: The configuration it was brought up with: file and environment together.
    config: Config = field(default_factory=Config)
    #: What of it came from the environment, as plain data: the next ``up`` lays it over the file again.
    overrides: Mapping[str, object] = field(default_factory=dict)
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
    #: ``http://HOST:PORT`` where the cluster that the farm started takes jobs; "" where nothing does.
    ray_jobs_url: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class FarmSettings:
    """A farm's state directory and its checked configuration."""

    #: Absolute.
    state_dir: Path
    #: What was asked for: defaults, the file (or what ``up`` recorded), the environment. ``redis.url == ""``
    #: means that the farm starts its own: this is what ``up`` goes by.
    wanted: Config
    #: The file it was read from; None: none.
    config_file: Path | None = None
    #: What of *wanted* came from the environment, now or at an earlier ``up``, as plain data.
    overrides: Mapping[str, object] = field(default_factory=dict)
    #: None: ``up`` was never finished here, or ``down`` was.
    running: Running | None = None
    #: Address of the gateway that is used instead of a farm of this machine; "" for none.
    gateway: str = ""

    @property
    def config(self) -> Config:
        """Return what holds: *wanted*, with what all of a farm's parts must agree on as it is recorded.

        Addresses and the numbers of shards and schedulers: what runs wins over the file and the environment, so that an
        edited ``redis.url`` takes effect with the next ``up``, not by splitting the farm in two.
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
            cache=replace(wanted.cache, shards=running.config.cache.shards),
            build=replace(wanted.build, schedulers=running.config.build.schedulers),
        )
