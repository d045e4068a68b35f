"""The configuration files of a one-node Swift with its S3 API.

One account, container and object server and a proxy, all on loopback, one replica, one device (a
plain directory). No memcached: the proxy's account and container look-ups go to the servers each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from storage.services.loopback import HOST

#: The storage servers in the order they are started, and the proxy that speaks S3.
STORAGE_SERVERS = ("account", "container", "object")
PROXY = "proxy"

#: Bytes read and written at once between client, proxy, object server and disk. Swift's own 64 KiB costs
#: more in eventlet's scheduling than in copying. Measured on 2 cores with 8 requests of 8 MiB at once, put
#: and get in MiB/s: 64 KiB 208 and 257, 256 KiB 218 and 337, 1 MiB 270 and 328; a second proxy worker and
#: a page cache kept for reads made no difference.
CHUNK_BYTES = 1024**2


@dataclass(frozen=True, slots=True, kw_only=True)
class SwiftSettings:
    """What differs from one farm's Swift to another's."""

    #: Holds ``etc/``, ``srv/`` and ``recon/``.
    root: Path
    #: By server name.
    ports: dict[str, int]
    #: Of the form ACCOUNT:USER.
    access_key_id: str
    secret_access_key: str
    region: str
    #: Name of the user that runs the servers: they insist on becoming somebody.
    user: str
    object_workers: int = 0
    proxy_workers: int = 0
    chunk_bytes: int = CHUNK_BYTES

    @property
    def etc(self) -> Path:
        """Return where the files are."""
        return self.root / "etc"

    def files(self) -> dict[str, str]:
        """Return each file's text by its name in ``etc/``; the proxy's holds the secret."""
        return {
            "swift.conf": _CLUSTER,
            **{f"{name}.conf": self._storage(name) for name in STORAGE_SERVERS},
            "proxy.conf": self._proxy(),
        }

    def _storage(self, name: str) -> str:
        return _STORAGE.format(
            host=HOST,
            port=self.ports[name],
            workers=self.object_workers if name == "object" else 0,
            user=self.user,
            etc=self.etc,
            devices=self.root / "srv",
            recon=self.root / "recon",
            name=name,
            extra=_OBJECT.format(chunk_bytes=self.chunk_bytes) if name == "object" else "",
        )

    def _proxy(self) -> str:
        account, _, member = self.access_key_id.partition(":")
        return _PROXY.format(
            host=HOST,
            port=self.ports[PROXY],
            workers=self.proxy_workers,
            user=self.user,
            etc=self.etc,
            region=self.region,
            account=account,
            member=member,
            secret=self.secret_access_key,
            chunk_bytes=self.chunk_bytes,
        )


_CLUSTER = """\
[swift-hash]
# Part of every path on disk: with another one, everything stored is lost.
swift_hash_path_prefix = lazyfarm
swift_hash_path_suffix = lazyfarm

[storage-policy:0]
name = gold
default = yes

[swift-constraints]
max_file_size = 5368709122
"""

_STORAGE = """\
[DEFAULT]
bind_ip = {host}
bind_port = {port}
# 0 serves from the process itself, without a parent that restarts workers.
workers = {workers}
user = {user}
swift_dir = {etc}
devices = {devices}
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
log_level = WARNING

[pipeline:main]
pipeline = {name}-server

[app:{name}-server]
use = egg:swift#{name}
log_requests = false
recon_cache_path = {recon}
{extra}"""

_OBJECT = """\
network_chunk_size = {chunk_bytes}
disk_chunk_size = {chunk_bytes}
# The page cache outlives a killed process. An fsync for each MiB is for power failures, which lose
# what is cached here anyway: a blob found damaged is fetched again.
mb_per_sync = 512
"""

_PROXY = """\
[DEFAULT]
bind_ip = {host}
bind_port = {port}
workers = {workers}
user = {user}
swift_dir = {etc}
log_level = WARNING

[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats s3api tempauth slo proxy-server

[app:proxy-server]
use = egg:swift#proxy
allow_account_management = true
account_autocreate = true
client_chunk_size = {chunk_bytes}
object_chunk_size = {chunk_bytes}
# A server that was away answers again as soon as it is back: Swift would leave one that failed eleven times alone for
# a minute and answer 503 meanwhile, which helps where there are others.
error_suppression_limit = 1000000000
error_suppression_interval = 1
node_timeout = 60
recoverable_node_timeout = 60
conn_timeout = 2

[filter:catch_errors]
use = egg:swift#catch_errors

[filter:gatekeeper]
use = egg:swift#gatekeeper

[filter:healthcheck]
use = egg:swift#healthcheck

[filter:listing_formats]
use = egg:swift#listing_formats

[filter:s3api]
use = egg:swift#s3api
location = {region}
s3_acl = false
check_bucket_owner = false
max_upload_part_num = 10000
dns_compliant_bucket_names = true
auth_pipeline_check = true
allow_multipart_uploads = true

[filter:tempauth]
use = egg:swift#tempauth
user_{account}_{member} = {secret} .admin

[filter:slo]
use = egg:swift#slo
max_manifest_segments = 10000
"""
