"""Stores: the file systems that read and write URIs, with our limits on their requests."""

import os
from functools import lru_cache
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from domainshuttle.pipelines.errors import DataError, masked
from domainshuttle.pipelines.storage.retry import Limits
from domainshuttle.pipelines.storage.uri import Location, holds_keys, shown

# What pyarrow reads from a URI but can't be told beside our limits.
_S3_UNSUPPORTED = ("smart_defaults", "tls_ca_dir_path", "tls_verify_certificates")


def opened(place: Location, limits: Limits, attempts: int = 1) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, one a process and store, and the path in it. With `attempts` above 1 it asks again for
    itself, request by request.

    Raises DataError where the URI is none, OSError where the store has to be asked (an S3 region) and fails.
    """
    address = urlsplit(str(place))
    if holds_keys(str(place).partition("?")[0]) and "@" not in address.netloc:
        raise DataError(f"{shown(place)}: its access keys can't be read: write / as %2F and + as %2B in them")
    root = urlunsplit(address._replace(path=""))
    variables = tuple(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION", *_ENDPOINTS))
    filesystem, base = _filesystem(root, variables, limits, attempts)
    return filesystem, f"{base.rstrip('/')}/{unquote(address.path).strip('/')}"


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


@lru_cache(maxsize=64)
def _filesystem(
    root: str, variables: tuple[str | None, ...], limits: Limits, attempts: int
) -> tuple[fs.FileSystem, str]:
    address = urlsplit(root)
    parameters = dict(parse_qsl(address.query))
    if address.scheme == "s3":
        if not address.netloc:
            raise DataError(f"{shown(root)!r} names no bucket: expected such as s3://bucket/folder")
        if given := [name for name in _S3_UNSUPPORTED if name in parameters]:
            raise DataError(f"{shown(root)}: parameters {given} are not supported; tls_ca_file_path is")
        region = variables[0] or variables[1]
        if region and "region" not in parameters:  # else pyarrow asks AWS where the bucket is
            parameters["region"] = region
    try:
        filesystem, base = fs.FileSystem.from_uri(urlunsplit(address._replace(query=urlencode(parameters))))
    except (ValueError, pa.ArrowException) as error:
        reason = masked(str(error))
        # not `from error`, which holds the whole URI
        raise DataError(f"{shown(root)} can't be opened ({reason}): expected such as s3://bucket/folder") from None
    if isinstance(filesystem, fs.S3FileSystem):
        # from_uri takes neither timeouts nor a retry strategy: the same file system is made again with them, from what
        # it would be pickled as. To make one waits for all requests that are under way, so they are made seldom.
        _, (options,) = filesystem.__reduce__()
        filesystem = fs.S3FileSystem(
            **options
            | {
                "retry_strategy": fs.AwsStandardS3RetryStrategy(max_attempts=attempts),
                "connect_timeout": limits.connect_seconds,
                "request_timeout": limits.stall_seconds,
                "allow_delayed_open": True,  # a small object is one request
            }
        )
    return filesystem, base
