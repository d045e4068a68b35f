"""S3 for tests: real servers, one each a session, and a proxy that does to their answers what a test says."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from cluster.config import S3Config
from storage.blobs import S3ContentStore
from storage.services.state_dir import StateDir
from storage.services.swift import SwiftService
from tests.doubles.ceph import CephRgw
from tests.doubles.s3_faults import S3FaultProxy

#: Few tries and short waits: what a test makes fail, fails soon.
_QUICK = S3Config(bucket="contract", timeout_s=10.0, attempts=3)


@pytest.fixture(scope="session")
def swift_s3() -> Iterator[S3Config]:
    """A Swift S3 server with a bucket; its configuration."""
    with tempfile.TemporaryDirectory(prefix="lf-s3-") as root:
        state = StateDir(Path(root))
        service = SwiftService(state)
        try:
            with state.lock("s3", deadline_s=60.0):
                service.start(_QUICK)
            config = service.reached_by(_QUICK)
            _make_bucket(config)
            yield config
        finally:
            service.stop()


@pytest.fixture(scope="session")
def ceph_s3() -> Iterator[S3Config]:
    """A Ceph RADOS gateway with a bucket; its configuration."""
    if shutil.which("radosgw") is None:
        pytest.skip("Ceph is not installed (ceph-mon ceph-osd ceph-mgr radosgw ceph-common)")
    with tempfile.TemporaryDirectory(prefix="lf-ceph-") as root, CephRgw(Path(root)) as ceph:
        config = replace(_QUICK, endpoint=ceph.endpoint, credentials_file=str(ceph.credentials_file))
        _make_bucket(config)
        yield config


@pytest.fixture
def s3_config(swift_s3: S3Config) -> S3Config:
    """A bucket of the test's own on Swift."""
    config = replace(swift_s3, bucket=f"test-{uuid4().hex}")
    _make_bucket(config)
    return config


@pytest.fixture
def s3_proxy(s3_config: S3Config) -> Iterator[S3FaultProxy]:
    """A fault proxy before the test's own bucket."""
    with S3FaultProxy(s3_config) as proxy:
        yield proxy


def _make_bucket(config: S3Config) -> None:
    store = S3ContentStore(config)
    try:
        store.ensure_bucket()
    finally:
        store.close()
