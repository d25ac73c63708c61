"""Locations: where data are, as a local path or as the URI of a store.

A path is taken as it is, whatever characters it has. A URI is `scheme://bucket/key?parameter=value`, such as
`s3://bucket/prefix` or, for a store of one's own, `s3://bucket/prefix?endpoint_override=http://10.0.0.7:9000`. In a key
`%`, `?` and `#` are written `%25`, `%3F` and `%23`; every other character may be written as it is or in that way
(RFC 3986). AWS's usual variables hold: keys, profile, region and endpoint.

What can't be read in one way only is refused: an address never means another object than the one that was written.
Nothing else in the package splits or joins addresses.
"""

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload
from urllib.parse import quote, unquote_to_bytes

from domainshuttle.pipelines.errors import DataError, mask_secrets

Location = str | Path

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ONE_SLASH = re.compile(r"(s3|gs|gcs|az|abfss?|hdfs|https?|file):/(?!/)")
"""What is left of a URI that was taken for a path, or mistyped."""
_ESCAPED = re.compile(r"[^A-Za-z0-9/._~+=,:!()*-]")
"""Characters of a key that are written as escapes, unless they are letters of another alphabet."""
_PARAMETER = re.compile(r"[A-Za-z][A-Za-z_-]*")
_BUCKET = re.compile(r"[A-Za-z0-9._$:\[\]-]+")


@dataclass(frozen=True, slots=True)
class StoreAddress:
    """The parts of a store's URI: `authority` is the bucket, perhaps with a user, keys or a port; `key` the name in it,
    unescaped, with slashes between its parts only; `query` the parameters, as they were written."""

    scheme: str
    authority: str
    key: str
    query: str = ""

    def __str__(self) -> str:
        """The one form in which we write this address."""
        path = f"/{_escaped(self.key)}" if self.key else ""
        return f"{self.scheme}://{self.authority}{path}{f'?{self.query}' if self.query else ''}"

    def parameters(self) -> dict[str, str]:
        """The parameters by name. Raises DataError for text that is no `name=value`."""
        found: dict[str, str] = {}
        for part in self.query.split("&") if self.query else ():
            name, _, value = part.partition("=")
            if not (_PARAMETER.fullmatch(name) and value) or name in found:
                raise DataError(
                    f"{self.redacted()}: {name!r} after the ? is no parameter, such as region=eu-west-1, or comes "
                    "twice: in a key, write ? as %3F"
                )
            found[name] = _unescaped(value, self.redacted())
        return found

    def redacted(self) -> str:
        """The address for people: without user, keys and parameters."""
        bucket = self.authority.rpartition("@")[2]
        return str(StoreAddress(self.scheme, bucket, self.key))


@lru_cache(maxsize=4096)
def store_address(uri: str) -> StoreAddress:
    """The parts of a store's URI. Raises DataError, with the remedy, where it can be read in two ways or in none."""
    named = _SCHEME.match(uri)
    if named is None:
        raise DataError(f"{uri!r} is no URI: expected such as s3://bucket/folder")
    scheme, rest = named[1].lower(), uri[named.end() :]
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if ":" in authority and "@" not in authority and "@" in rest:
        raise DataError(
            f"{mask_secrets(uri)}: its access keys can't be read: write / as %2F and + as %2B in them, and in a key @ "
            "as %40"
        )
    path, _, query = rest.partition("?")
    where = mask_secrets(f"{named[0]}{path}")
    if "#" in rest:
        advice = where.replace("#", "%23")
        raise DataError(f"{mask_secrets(uri)}: a # in a URI is no part of the key: write it as %23, such as {advice}")
    if not _BUCKET.fullmatch(authority.rpartition("@")[2]):
        raise DataError(f"{where!r} names no bucket: expected such as s3://bucket/folder")
    address = StoreAddress(scheme, authority, _unescaped(path.partition("/")[2], where).removesuffix("/"), query)
    _check_parts(address.key, where)
    address.parameters()
    return address


def _escaped(key: str) -> str:
    """A key as it is written in a URI: letters of other alphabets as they are, so that people can read them."""

    def escape(match: re.Match[str]) -> str:
        one = match[0]
        return one if not one.isascii() and one.isprintable() and not one.isspace() else quote(one)

    return _ESCAPED.sub(escape, key)


def _unescaped(text: str, where: str) -> str:
    if bad := re.search(r"%(?![0-9A-Fa-f]{2})", text):
        raise DataError(f"{where}: {text[bad.start() : bad.start() + 3]!r} is no escape: write % as %25")
    try:
        return unquote_to_bytes(text.encode()).decode()
    except UnicodeError as error:
        raise DataError(f"{where}: it is not UTF-8 ({error}); only such keys can be read") from None


def _check_parts(name: str, where: str) -> None:
    """Raises DataError for a key with parts that file systems and HTTP clients take for others, or that none takes."""
    try:
        name.encode()
    except UnicodeError:
        raise DataError(f"{where!r}: it is not UTF-8; rename it") from None
    if name and not all(name.split("/")):
        raise DataError(f"{where}: two slashes in a row, or one at the beginning of a key: not supported; rename it")
    if {".", ".."} & set(name.split("/")):
        raise DataError(f"{where}: . and .. would lead to another folder: write the address without them")
    if control := re.search(r"[\x00-\x1f\x7f]", name):
        raise DataError(f"{where}: the control character {control[0]!r} is not supported in a key; rename it")


def is_remote(location: Location) -> bool:
    """Whether a location is in a store rather than on a local or shared disk."""
    return isinstance(location, str) and (named := _SCHEME.match(location)) is not None and named[1].lower() != "file"


def local_path(location: Location) -> Path:
    """The path of a location that is not remote. Raises DataError for what is neither a path nor a `file://` URI."""
    text = str(location)
    if _ONE_SLASH.match(text):
        raise DataError(f"{text}: one slash after the scheme: a URI has two, such as s3://bucket/folder")
    if not isinstance(location, str) or _SCHEME.match(text) is None:
        return Path(location)
    if is_remote(text):
        raise DataError(f"{redacted(text)} is in a store: expected a local or shared path")
    host, slash, path = text[len("file://") :].partition("/")
    if host not in ("", "localhost") or not slash:
        raise DataError(f"{text}: the path of a file:// URI begins with a slash, such as file:///data/corpora")
    if found := set(path) & set("?#"):
        raise DataError(
            f"{text}: write {' and '.join(sorted(found))} of a file's name as %3F and %23, or give the path"
        )
    if bad := re.search(r"%(?![0-9A-Fa-f]{2})", path):
        raise DataError(
            f"{text}: {path[bad.start() : bad.start() + 3]!r} is no escape: write % as %25, or give the path"
        )
    return Path(os.fsdecode(b"/" + unquote_to_bytes(os.fsencode(path))))


def require_local(location: Location, work: str) -> Path:
    """The path of a location; raises DataError, with the remedy, where `work` is asked for in a store."""
    if is_remote(location):
        raise DataError(
            f"{work} needs a local or shared folder, and {redacted(location)} is in a store: do it with --set "
            "data=FOLDER, then upload the folder (docs/corpus.md, 'Corpora on S3')"
        )
    return local_path(location)


def absolute(location: Location) -> Location:
    """A local path made absolute, with the home folder for a `~` that text begins with; a URI in the one form in which
    we write it, so that two of the same object are equal. Raises DataError for what is no location."""
    if is_remote(location):
        return str(store_address(str(location)))
    path = local_path(location)
    if isinstance(location, str) and location.startswith("~"):
        try:
            path = path.expanduser()
        except RuntimeError as error:
            raise DataError(f"{location}: {error}; a folder of that name is written ./{location}") from None
    if "\0" in str(path):
        raise DataError(f"{str(path)!r}: no file has such a character in its name: remove it")
    try:
        str(path).encode()
    except UnicodeError:
        raise DataError(f"{str(path)!r}: the path is not UTF-8, so no index can name it: rename the folder") from None
    return path.absolute()


@overload
def join(location: str, name: str) -> str: ...
@overload
def join(location: Path, name: str) -> Path: ...
def join(location: Location, name: str) -> Location:
    """The location of `name`, which may have folders, in the folder `location`; of the kind that `location` is.

    The name is taken as it is, with no escapes. Raises DataError where it would lead out of the folder.
    """
    if name.startswith("/") or ".." in name.split("/"):
        raise DataError(f"{name!r} leads out of the folder {redacted(location)}: expected a name in it")
    if isinstance(location, Path):
        return local_path(location) / name
    if not is_remote(location):
        is_uri = _SCHEME.match(location) or _ONE_SLASH.match(location)
        return os.path.join(local_path(location) if is_uri else location, name)  # noqa: PTH118 - a Path forgets ./
    address = store_address(location)
    name = name.removesuffix("/")
    _check_parts(name, f"{redacted(location)}/{name}")
    key = "/".join(filter(None, (address.key, name)))
    return str(StoreAddress(address.scheme, address.authority, key, address.query))


def parent(location: Location) -> Location:
    """The folder that a location is in; of a bucket, itself."""
    if not is_remote(location):
        return local_path(location).parent
    address = store_address(str(location))
    return str(StoreAddress(address.scheme, address.authority, address.key.rpartition("/")[0], address.query))


def name_of(location: Location) -> str:
    """The last part of a location's path, without escapes; of a bucket, nothing."""
    key = store_address(str(location)).key if is_remote(location) else local_path(location).name
    return key.rpartition("/")[2]


def redacted(location: Location) -> str:
    """A location for people: without access keys, and without the parameters of a URI, which may hold some."""
    if not is_remote(location):
        return str(location)
    try:
        return store_address(str(location)).redacted()
    except DataError:
        return mask_secrets(str(location)).partition("?")[0]


def holds_keys(location: Location) -> bool:
    """Whether a URI has a user, access keys or another secret in it, also where they are not escaped as they should
    be."""
    return is_remote(location) and mask_secrets(str(location)) != str(location)
