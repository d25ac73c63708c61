"""The data of a segment, as the configuration describes it."""

from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.plan.feed import EncoderSources, Feed
from domainshuttle.pipelines.storage.uri import join
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.segments import Segment
from domainshuttle.platform.run.weights_digest import Fingerprints


def require_unchanged(feed: Feed, fingerprints: Fingerprints) -> None:
    """Compares the rows of each index with the digest that the data order is known by; read once, and again where the
    file has changed. Raises DataError."""
    for place in feed.indexes:
        fingerprints.of_index(place)


def make_feed(config: RunConfig, segment: Segment) -> Feed:
    """The data of a segment: encoded corpora, or raw ones that are encoded while they are trained on."""
    stage = segment.stage
    return Feed(
        indexes=tuple(
            join(config.corpus_folder(name, config.trained_form), INDEX_NAME) for name in sorted(stage.mixture)
        ),
        mixture=tuple(stage.weights.items()),
        where=tuple(stage.where.get(name) for name in sorted(stage.mixture)) if stage.where else (),
        seed=segment.seed,
        global_batch=stage.global_batch,
        micro_batch=stage.micro_batch,
        text_len=config.encoders.text_len,
        references=stage.references,
        reference_dropout=stage.reference_dropout,
        text_dropout=stage.text_dropout,
        paired=stage.loss.cross_pair_weight > 0,
        encoders=EncoderSources(**config.encoders.model_dump(exclude={"live"})) if config.encoders.live else None,
    )
