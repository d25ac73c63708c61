"""The data of a segment, as the configuration describes it."""

import dataclasses
import json

from domainshuttle.model.encoder_sources import encoder_files
from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.table import read_metadata
from domainshuttle.pipelines.plan.feed import EncoderSources, Feed
from domainshuttle.pipelines.plan.step_plan import ORDER_VERSION
from domainshuttle.pipelines.storage.files import write_bytes
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.weights_digest import Fingerprints


def require_unchanged(feed: Feed, fingerprints: Fingerprints) -> None:
    """Compares the rows of each index with the digest that the data order is known by; read once, and again where the
    file has changed. Raises DataError."""
    for share in feed.shares:
        fingerprints.of_index(share.index)


def require_same_encoders(config: RunConfig, feed: Feed, run: Run) -> None:
    """Compares the encoders' files on this machine with those by which the corpora of a feed were encoded, or of live
    encoding with those that the run began with; each file is read once, and again where it has changed.

    Raises DataError where they are others. Encoders that are not here, and corpora that do not say, are not compared.
    """
    named = config.encoders.sources().by_kind
    files = {kind: found for kind, source in named if (found := encoder_files(source, kind))}
    now = {f"{kind}_files": run.fingerprints.of_encoder(found) for kind, found in files.items()}
    if not feed.encoders:
        for share in feed.shares:
            metadata = read_metadata(share.index)
            for kind, source in named:
                before = metadata.encoders.get(f"{kind}_files")
                if before and now.get(f"{kind}_files", before) != before:
                    raise DataError(
                        f"corpus {metadata.corpus!r} was encoded by other files than those of encoders.{kind}="
                        f"{source}: name the encoder that it was encoded by ({metadata.encoders.get(kind)}), or encode "
                        f"it again with `domainshuttle data encode CONFIG --overwrite`"
                    )
        return
    noted = run.noted_encoders()
    both = {**now, **noted}  # as it was noted first, and what is here for the first time
    if changed := [kind for kind, _ in named if (name := f"{kind}_files") in now and now[name] != both[name]]:
        raise DataError(
            f"encoders.{changed[0]} has other files than the run {run.config.name} began with: bring them back, or "
            "begin a new run with another `name`"
        )
    if both != noted:
        write_bytes(run.encoders_path, json.dumps(both).encode())


def make_feed(config: RunConfig, segment: Segment, order: int = ORDER_VERSION) -> Feed:
    """The data of a segment: encoded corpora, or raw ones that are encoded while they are trained on. `order` is the
    version of the data order, of a segment that has begun that which it began with (`Run.order_version`)."""
    stage = segment.stage
    return Feed(
        shares=tuple(
            config.corpus(name).share(stage.weights.get(name), stage.where.get(name)) for name in sorted(stage.mixture)
        ),
        seed=segment.seed,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        text_len=config.encoders.text_len,
        references=stage.references,
        reference_dropout=stage.reference_dropout,
        text_dropout=stage.text_dropout,
        paired=stage.loss.cross_pair_weight > 0,
        encoders=_live_encoders(config),
        order=order,
    )


def _live_encoders(config: RunConfig) -> EncoderSources | None:
    """What live encoding loads, with the digests that its actors compare their node's files with."""
    if not config.encoders.live:
        return None
    return dataclasses.replace(config.encoders.sources(), files=tuple(sorted(Run(config).noted_encoders().items())))
