"""The peers, each at its best, and what they are."""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config as BotoConfig
from mypy_boto3_s3 import S3Client

from cluster.config import S3Config
from storage.s3_credentials import FileCredentials
from tests.doubles.oci_layout import run_tool
from tests.doubles.redis import redis_binaries

_MIB = 1 << 20
#: Concurrent parts that are tried; the fastest is what counts.
_CONCURRENCIES = (4, 8, 16)
#: Sizes of parts that are tried, in bytes; a file of no more than one part is one PUT.
_PARTS_BYTES = (8 * _MIB, 32 * _MIB)


def skopeo_and_umoci(reference: str, work: Path) -> tuple[float, float]:
    """Copy an image from its registry and unpack it; return the seconds of each."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    began = time.monotonic()
    run_tool(
        *("skopeo", "--insecure-policy", "copy", "--quiet", "--src-tls-verify=false"),
        *(f"docker://{reference}", f"oci:{work}/layout:image"),
    )
    copied = time.monotonic()
    run_tool("umoci", "unpack", "--image", f"{work}/layout:image", f"{work}/bundle")
    unpacked = time.monotonic()
    shutil.rmtree(work)
    return copied - began, unpacked - copied


def ray_init(address: str, token_file: str) -> float:
    """Join a Ray cluster as a program that does nothing else; return the seconds from its start to its end."""
    code = f"import ray; ray.init(address={address!r}, logging_level='ERROR', log_to_driver=False); ray.shutdown()"
    environ = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_file}
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, timeout=60)
    return time.monotonic() - began


def boto3_upload(files: Sequence[Path], s3: S3Config, prefix: str) -> tuple[float, str]:
    """Upload files in parallel, at several settings; return the best time and its setting."""
    best_s, best = float("inf"), ""
    for concurrency, part_bytes in itertools.product(_CONCURRENCIES, _PARTS_BYTES):
        client = _client(s3, connections=2 * concurrency)
        transfer = TransferConfig(
            multipart_threshold=part_bytes, multipart_chunksize=part_bytes, max_concurrency=concurrency
        )

        def upload(file: Path, client: S3Client = client, transfer: TransferConfig = transfer) -> None:
            client.upload_file(str(file), s3.bucket, f"{prefix}/{file.name}", Config=transfer)

        files_at_once = max(1, concurrency // 2)
        with ThreadPoolExecutor(files_at_once) as pool:
            began = time.monotonic()
            list(pool.map(upload, files))
            seconds = time.monotonic() - began
        for file in files:
            client.delete_object(Bucket=s3.bucket, Key=f"{prefix}/{file.name}")
        client.close()
        if seconds < best_s:
            best_s = seconds
            best = f"{files_at_once} files, {concurrency} parts of {part_bytes // _MIB} MiB each at once"
    return best_s, best


def _client(s3: S3Config, connections: int) -> S3Client:
    keys = FileCredentials(s3.credentials_file)
    return boto3.client(
        "s3",
        endpoint_url=s3.endpoint,
        region_name=s3.region,
        aws_access_key_id=keys.access_key,
        aws_secret_access_key=keys.secret_key,
        config=BotoConfig(
            max_pool_connections=connections,
            s3={"addressing_style": "path"},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def versions() -> dict[str, str]:
    """Return what was measured against, and on what."""
    found = {
        "machine": f"{platform.machine()}, {_cpus()} CPUs, Linux {platform.release()}",
        "python": platform.python_version(),
        "skopeo copy --quiet": _first_line("skopeo", "--version"),
        "umoci unpack": _first_line("umoci", "--version"),
        "docker-registry": _first_line("docker-registry", "--version"),
        "boto3": version("boto3"),
        "ray": version("ray"),
        "distributed": version("distributed"),
    }
    for name, binary in redis_binaries().items():
        found[name] = _first_line(binary, "--version")
    return found


def _cpus() -> int:
    return len(os.sched_getaffinity(0))


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    lines = (done.stdout or done.stderr).strip().splitlines()
    return lines[0] if lines else "?"
