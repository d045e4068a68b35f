"""TLS to S3: whose certificate is trusted, and what is said where it is not."""

from __future__ import annotations

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from cluster.config import S3Config
from cluster.errors import UnsafeStoreError
from storage.blobs import S3ContentStore
from tests.doubles.registry import Authority, make_authority

pytestmark = pytest.mark.s3


@contextmanager
def behind_tls(s3: S3Config, authority: Authority) -> Iterator[S3Config]:
    """Put a server that speaks TLS before *s3*; say how to reach it, without whom to trust."""
    upstream = urlsplit(s3.endpoint)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority.certificate, authority.key)
    loop = asyncio.new_event_loop()

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(upstream.hostname, upstream.port)
        with suppress(asyncio.CancelledError):
            await asyncio.gather(pipe(reader, there[1]), pipe(there[0], writer))

    server = loop.run_until_complete(asyncio.start_server(forward, "127.0.0.1", 0, ssl=context))
    port = server.sockets[0].getsockname()[1]
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield replace(s3, endpoint=f"https://127.0.0.1:{port}", ca_file="", attempts=1, timeout_s=10.0)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()


def test_s3_is_spoken_with_over_tls_where_its_authority_is_trusted(swift_s3, tmp_path):
    """With `s3.ca_file` an object is put, read and deleted; without it or with another one, nothing is sent."""
    authority = make_authority(tmp_path)
    (tmp_path / "other").mkdir()
    other = make_authority(tmp_path / "other")
    with behind_tls(swift_s3, authority) as config:
        store = S3ContentStore(replace(config, ca_file=str(authority.ca_file)))
        store.ensure_bucket()
        assert store.check().endpoint == config.endpoint
        store.close()
        for ca_file in ("", str(other.ca_file)):
            store = S3ContentStore(replace(config, ca_file=ca_file))
            with pytest.raises(UnsafeStoreError, match="certificate doesn't verify") as refused:
                store.check()
            assert "s3.ca_file" in refused.value.hint
            store.close()
