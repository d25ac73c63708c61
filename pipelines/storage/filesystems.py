"""Stores: the file systems that read and write URIs, with our limits on their requests."""

import os
from functools import lru_cache
from urllib.parse import urlencode

import pyarrow as pa
from pyarrow import fs

from domainshuttle.pipelines.errors import DataError, mask_secrets
from domainshuttle.pipelines.storage.retry import Limits
from domainshuttle.pipelines.storage.uri import Location, StoreAddress, store_address

# What pyarrow reads from a URI but can't be told beside our limits.
_S3_UNSUPPORTED = ("smart_defaults", "tls_ca_dir_path", "tls_verify_certificates")


def opened(location: Location, limits: Limits, attempts: int = 1) -> tuple[fs.FileSystem, str]:
    """The file system of a URI, one a process and store, and the path in it. With `attempts` above 1 it asks again for
    itself, request by request.

    Raises DataError where the URI is none, OSError where the store has to be asked (an S3 region) and fails.
    """
    address = store_address(str(location))
    variables = tuple(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION", *_ENDPOINTS))
    root = StoreAddress(address.scheme, address.authority, "", address.query)
    filesystem, base = _filesystem(root, variables, limits, attempts)
    return filesystem, "/".join(filter(None, (base.rstrip("/"), address.key)))


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")


@lru_cache(maxsize=64)
def _filesystem(
    root: StoreAddress, variables: tuple[str | None, ...], limits: Limits, attempts: int
) -> tuple[fs.FileSystem, str]:
    parameters = root.parameters()
    if root.scheme == "s3":
        if given := [name for name in _S3_UNSUPPORTED if name in parameters]:
            raise DataError(f"{root.redacted()}: parameters {given} are not supported; tls_ca_file_path is")
        region = variables[0] or variables[1]
        if region and "region" not in parameters:  # else pyarrow asks AWS where the bucket is
            parameters["region"] = region
    query = f"?{urlencode(parameters)}" if parameters else ""
    try:
        filesystem, base = fs.FileSystem.from_uri(f"{root.scheme}://{root.authority}{query}")
    except (ValueError, pa.ArrowException) as error:
        reason = mask_secrets(str(error))
        # not `from error`, which holds the whole URI
        raise DataError(
            f"{root.redacted()} can't be opened ({reason}): expected such as s3://bucket/folder; a ? in a key is "
            "written %3F"
        ) from None
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
