"""Places: where data are, as a local path or as the URI of a store.

A URI is anything that `pyarrow.fs.FileSystem.from_uri` takes, such as `s3://bucket/prefix` or, for a store of one's
own, `s3://bucket/prefix?endpoint_override=http://10.0.0.7:9000`. AWS's usual variables hold: keys, profile, region and
endpoint.
"""

from pathlib import Path
from typing import overload
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from domainshuttle.pipelines.errors import DataError, masked

Location = str | Path

_LOCAL = "file://"


def is_remote(place: Location) -> bool:
    """Whether a place is in a store rather than on a local or shared disk."""
    return isinstance(place, str) and "://" in place and not place.startswith(_LOCAL)


def local_path(place: Location) -> Path:
    """The path of a place that is not remote."""
    text = str(place)
    return Path(unquote(urlsplit(text).path)) if text.startswith(_LOCAL) else Path(place)


def require_local(place: Location, work: str) -> Path:
    """The path of a place; raises DataError, with the remedy, where `work` is asked for in a store."""
    if is_remote(place):
        raise DataError(
            f"{work} needs a local or shared folder, and {shown(place)} is in a store: do it with --set data=FOLDER, "
            "then upload the folder (docs/corpus.md, 'Corpora on S3')"
        )
    return local_path(place)


def absolute(place: Location) -> Location:
    """A local path made absolute; a URI as it is."""
    return place if is_remote(place) else local_path(place).expanduser().absolute()


@overload
def join(place: str, name: str) -> str: ...
@overload
def join(place: Path, name: str) -> Path: ...
def join(place: Location, name: str) -> Location:
    """The place of `name`, which may have folders, in the folder `place`; of the kind that `place` is."""
    if isinstance(place, Path):
        return place / name
    if not is_remote(place):
        return str(local_path(place) / name)
    address = urlsplit(place)
    return urlunsplit(address._replace(path=f"{address.path.rstrip('/')}/{quote(name)}"))


def parent(place: Location) -> Location:
    """The folder that a place is in."""
    if not is_remote(place):
        return local_path(place).parent
    address = urlsplit(str(place))
    return urlunsplit(address._replace(path=address.path.rstrip("/").rpartition("/")[0]))


def name_of(place: Location) -> str:
    """The last part of a place's path."""
    path = unquote(urlsplit(str(place)).path) if is_remote(place) else local_path(place).name
    return path.rstrip("/").rpartition("/")[2]


def shown(place: Location) -> str:
    """A place for people: without access keys, and without the parameters of a URI, which may hold some."""
    return masked(str(place)).partition("?")[0] if is_remote(place) else str(place)


def holds_keys(place: Location) -> bool:
    """Whether a URI has a user, access keys or another secret in it, also where they are not escaped as they should
    be."""
    return is_remote(place) and masked(str(place)) != str(place)
