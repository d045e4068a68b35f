"""What a Redis server is trusted by, and what it may know us by: certificates, from ``[redis]``."""

from __future__ import annotations

import ssl

from cluster.config import RedisConfig


def trust(config: RedisConfig) -> ssl.SSLContext:
    """Return the TLS context to connect with; reads the files that *config* names.

    Raises:
        ValueError: a file can't be used: which key names it, and why.
    """
    try:
        context = ssl.create_default_context(cafile=config.ca_file or None)
    except OSError as exc:  # ssl.SSLError is one
        raise ValueError(f"redis.ca_file: {config.ca_file} can't be read as PEM ({exc.strerror or exc})") from exc
    if config.client_cert_file:
        try:
            context.load_cert_chain(config.client_cert_file, config.client_key_file or None)
        except OSError as exc:
            raise ValueError(
                f"redis.client_cert_file: {config.client_cert_file} and redis.client_key_file don't make a "
                f"certificate with its key ({exc.strerror or exc})"
            ) from exc
    return context


def advice(error: BaseException | None) -> str:
    """Return what to do about a connection that *error* prevented; "" where TLS and logins have no part in it."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return (
                "set redis.ca_file to the authority that signed the server's certificate, "
                "and name the server in redis.url as its certificate does"
            )
        if isinstance(error, ssl.SSLError):
            # Of a server that wants a certificate, and of one that takes TLS for garbage, OpenSSL tells the same.
            return (
                "set redis.client_cert_file and redis.client_key_file, if the server asks for a certificate; "
                "if it doesn't speak TLS on that port, use its tls-port, or redis://"
            )
        code = str(error).partition(" ")[0]
        if code in ("WRONGPASS", "NOAUTH"):
            return "set redis.username and redis.password_file as the server knows them"
        if code == "NOPERM" or "The user executing the script" in str(error):
            return "give the user the rights that docs/operations.md lists (ACL SETUSER)"
        error = error.__cause__
    return ""
