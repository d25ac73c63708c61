"""What a run needs beside its nodes: the tracking server, the base's weights, and corpora that are whole."""

import shlex
from collections.abc import Callable, Iterator

from domainshuttle.pipelines.errors import UserFacingError, mask_secrets, one_line
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.storage.files import list_files
from domainshuttle.pipelines.storage.uri import redacted
from domainshuttle.platform.cluster_checks.findings import Finding, failure, passed, warning
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.driver.preflight import require_data, require_model
from domainshuttle.platform.tracking.mlflow import probe


def check_services(config: RunConfig) -> Iterator[Finding]:
    """Tracking, base and corpora, each from the driver's place."""
    yield from _tracking(config)
    yield _asked("base", lambda: require_model(config), "its description is readable, and the configuration fits it")
    data = _asked("corpora", lambda: require_data(config), "indexed as configured")
    yield data
    if data.verdict == "pass":
        yield from _shards(config)


def _asked(check: str, question: Callable[[], object], good: str) -> Finding:
    try:
        question()
    except (UserFacingError, OSError) as error:
        return failure(check, str(error))
    return passed(check, good)


def _tracking(config: RunConfig) -> Iterator[Finding]:
    shown = mask_secrets(config.tracking_uri)
    try:
        probe(config.tracking_uri, config.tracking.experiment)
    except UserFacingError as error:
        # training goes on without it, and what is logged waits
        yield warning("tracking", str(error), shown, "correct tracking.uri; a run would keep its metrics in its folder")
    else:
        yield passed("tracking", "a run was made, logged to with a file, and deleted", shown)


def _shards(config: RunConfig) -> Iterator[Finding]:
    """Each shard that an index names is there; `data verify` reads them."""
    for name in sorted({name for stage in config.stages for name in stage.mixture}):
        corpus = config.corpus(name)
        try:
            rows = Index.load(corpus.index, ("shard",), verify=False)
            named = set(rows.table.column("shard").unique().to_pylist())
            there = {path.rpartition("/")[2] for path, _ in list_files(corpus.folder)}
        except (UserFacingError, OSError) as error:
            yield failure("corpora", one_line(error), redacted(corpus.folder))
            continue
        if missing := sorted(named - there):
            yield failure("corpora", f"{len(missing)} of {len(named)} shards of its index are missing, such as "
                          f"{missing[0]}", redacted(corpus.folder), "bring them back, or index the corpus again: "
                          f"domainshuttle data index {shlex.quote(redacted(corpus.folder))}")  # fmt: skip
        else:
            yield passed("corpora", f"{name}: all {len(named)} shards of its index are there", redacted(corpus.folder))
