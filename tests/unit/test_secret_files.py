"""Files with secrets that are no text: one clear error each, which doesn't quote them."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.config import RedisConfig
from cluster.errors import ClusterError, ConfigError, InvalidArgumentError
from lazyfarm.gateway.access import Access
from storage.address import redis_address
from storage.s3_credentials import FileCredentials


@pytest.mark.parametrize(
    ("read", "error"),
    [
        (lambda file: Access.of("https://farm.example.com", {}, token_file=file), InvalidArgumentError),
        (lambda file: redis_address(RedisConfig(url="redis://h", password_file=str(file))), ConfigError),
        (lambda file: FileCredentials(str(file)).access_key, ConfigError),
    ],
    ids=["the gateway's token", "Redis's password", "S3's keys"],
)
def test_a_secret_that_is_no_text_is_told_by_its_files_name(
    tmp_path: Path, read: Callable[[Path], object], error: type[ClusterError]
):
    """In UTF-16, say, as an editor of Windows may have it."""
    file = tmp_path / "secret"
    file.write_bytes("wonder-land".encode("utf-16"))
    with pytest.raises(error, match="it is not UTF-8 text") as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert "wonder" not in "".join(traceback.format_exception(caught.value)).replace("\\x00", "")
