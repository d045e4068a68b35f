"""What S3 and its client say, as our errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.errors import (
    BlobNotFoundError,
    ClusterError,
    ConfigError,
    StoreFullError,
    UnavailableError,
    UnsafeStoreError,
)

if TYPE_CHECKING:
    from botocore.exceptions import ClientError

#: The object, the upload or one of its parts is not there (any more), or not the one it was.
_GONE = frozenset({"NoSuchKey", "NoSuchUpload", "InvalidPart", "NotFound", "404", "PreconditionFailed", "412"})
#: What has to be set otherwise: how it is said, and what to do.
_SETTINGS = (
    (frozenset({"NoSuchBucket"}), "no such bucket", "create it, or let `lazyfarm up` do so"),
    (
        frozenset(
            {
                "AccessDenied",
                "AuthorizationHeaderMalformed",
                "InvalidAccessKeyId",
                "SignatureDoesNotMatch",
                "403",
                "401",
            }
        ),
        "refused to {doing} {key}: {code}",
        "check s3.credentials_file, and that its key may read, write, list and delete in the bucket",
    ),
    (
        frozenset({"ExpiredToken", "ExpiredTokenException", "InvalidToken", "TokenRefreshRequired"}),
        "refused to {doing} {key}: {code}",
        "put new keys into s3.credentials_file: they are used from then on, without a restart",
    ),
    (
        frozenset({"RequestTimeTooSkewed", "RequestExpired"}),
        "a clock too far from this machine's",
        "synchronise the clocks (NTP)",
    ),
)
#: By name, as servers differ in the status: AWS and Ceph, MinIO's disks and its quota.
_FULL = frozenset(
    {"InsufficientStorage", "QuotaExceeded", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded", "507"}
)
_INSUFFICIENT_STORAGE = 507
#: 4xx that the next try may not meet: bytes damaged or cut short on the way, and "too fast".
_PASSING = frozenset(
    {
        "BadDigest",
        "IncompleteBody",
        "OperationAborted",
        "RequestTimeout",
        "SlowDown",
        "TooManyRequests",
        "XAmzContentSHA256Mismatch",
        "429",
    }
)
_SERVER_ERROR = 500


@contextmanager
def translated(where: str, doing: str, key: str) -> Iterator[None]:
    """Turn what botocore, urllib3 and the socket raise into our errors.

    Raises:
        BlobNotFoundError: the object, the upload or one of its parts is gone.
        StoreFullError: there is no room for it.
        UnsafeStoreError: the store refuses: credentials, bucket, clock, or a request it doesn't know.
        ConfigError: there are no credentials.
        UnavailableError: anything else: no answer, or one that says "not now".
    """
    try:
        yield
    except ClusterError:
        raise
    except Exception as exc:
        raise _ours(exc, where, doing, key) from exc


def _ours(exc: Exception, where: str, doing: str, key: str) -> Exception:
    from botocore.exceptions import (  # noqa: PLC0415 - imported with the client, not before
        BotoCoreError,
        ClientError,
        NoCredentialsError,
        ParamValidationError,
        PartialCredentialsError,
        SSLError,
    )
    from urllib3.exceptions import HTTPError  # noqa: PLC0415 - likewise

    match exc:
        case ClientError():
            return _answered(exc, where, doing, key)
        case NoCredentialsError() | PartialCredentialsError():
            return ConfigError("s3", ("s3.credentials_file: not set, and boto3 finds no credentials either",))
        case ParamValidationError():
            return exc  # our bug: let it be seen as what it is
        case SSLError() if "CERTIFICATE_VERIFY_FAILED" in str(exc):
            return UnsafeStoreError(
                where,
                "its certificate doesn't verify",
                "set s3.ca_file to the authority that signed it, and name the server in s3.endpoint as it does",
            )
        case _ if isinstance(exc, BotoCoreError | HTTPError | OSError) or type(exc).__module__ == "http.client":
            return UnavailableError(where, f"could not {doing} {key}: {type(exc).__name__}")
        case _:
            return exc


def _answered(exc: ClientError, where: str, doing: str, key: str) -> ClusterError:
    code = str(exc.response.get("Error", {}).get("Code", ""))
    status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    for codes, setting, advice in _SETTINGS:
        if code in codes:
            return UnsafeStoreError(where, setting.format(doing=doing, key=key, code=code), advice)
    answered = f"{doing} {key}: HTTP {status} {code}"
    if code in _GONE:
        return BlobNotFoundError(key, where)
    if code in _FULL or status == _INSUFFICIENT_STORAGE:
        return StoreFullError(where, f"could not {answered}")
    if code in _PASSING or status >= _SERVER_ERROR:
        return UnavailableError(where, f"could not {answered}")
    return UnsafeStoreError(where, f"refused to {answered}", "use an S3 server that has multi-part uploads and ranges")
