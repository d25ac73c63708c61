"""What is checked before anything is made or a cluster is asked for anything."""

import shlex

from domainshuttle.pipelines.errors import DataError
from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.selection import selected_rows
from domainshuttle.pipelines.index.table import read_metadata
from domainshuttle.pipelines.storage.files import exists, open_parquet
from domainshuttle.pipelines.storage.uri import join, redacted
from domainshuttle.platform.config.schema import ExpertSection, RunConfig
from domainshuttle.platform.console import console


def require_encoded(config: RunConfig) -> None:
    """Raises DataError that names every corpus that the stages need and that is not there in the form they train on
    (raw where encoders.live is set), with the commands."""
    needed = sorted({corpus for stage in config.stages for corpus in stage.mixture})
    form = config.trained_form
    missing = [name for name in needed if not exists(join(config.corpus_folder(name, form), INDEX_NAME))]
    if missing:
        commands = []
        if any(config.corpora[name].build for name in missing):
            commands.append("domainshuttle data build CONFIG")
        if own := [name for name in missing if not config.corpora[name].build]:
            folder = shlex.quote(redacted(config.corpus_folder(own[0], "raw")))
            commands.append(f"domainshuttle data index {folder} --corpus {own[0]} ...")
        if form == "encoded":
            commands.append("domainshuttle data encode CONFIG")
        raise DataError(
            f"corpora {missing} are not {'encoded' if form == 'encoded' else 'built'} in {redacted(config.data)}. Run: "
            f"{', then '.join(commands)} (or point `data` at a folder that has them)"
        )
    for name in needed:
        _require_as_configured(config, name, join(config.corpus_folder(name, form), INDEX_NAME))


def _require_as_configured(config: RunConfig, name: str, place: str) -> None:
    """Raises DataError where an index was made otherwise than the configuration says, and training would not notice."""
    section, found = config.corpora[name], read_metadata(place)
    if found.fps != section.fps:
        rates = [f"{rate:g}" if rate else "each clip's own" for rate in (found.fps, section.fps)]
        raise DataError(
            f"corpus {name!r} was indexed at {rates[0]} frames a second, and corpora.{name}.fps says {rates[1]}: "
            "correct it, or index the corpus again with --fps (nothing is read again) and encode it "
            f"({redacted(place)})"
        )
    buckets = set(open_parquet(place).read(["bucket"]).column("bucket").unique().to_pylist())
    if more := sorted(buckets - set(section.buckets)):
        raise DataError(
            f"corpus {name!r} has samples in buckets {more}, which corpora.{name}.buckets does not list: add them, or "
            f"index the corpus again with those of the configuration ({redacted(place)})"
        )
    if found.stage == "raw":
        return
    encoders = config.encoders
    for kind, source, ending in (("video", encoders.video, ""), ("text", encoders.text, f":{encoders.text_len}")):
        identity = str(found.encoders.get(kind, ""))
        if not identity.endswith(ending):
            raise DataError(
                f"corpus {name!r} was encoded with captions of {identity.rpartition(':')[2]} tokens, and "
                f"encoders.text_len is {encoders.text_len}: correct it, or encode the corpus again"
            )
        if not identity.startswith(f"{source}:"):  # it may be the same under another name
            console.print(
                f"Corpus {name} was encoded by {identity}, and encoders.{kind} is {source}: unless they are the same, "
                "encode it again"
            )


def require_data(config: RunConfig) -> None:
    """Raises DataError for corpora that are not encoded and filters that leave nothing."""
    require_encoded(config)
    for stage in config.stages:
        for name, where in stage.where.items():
            selected_rows(join(config.corpus_folder(name, config.trained_form), INDEX_NAME), where)


def require_model(config: RunConfig) -> None:
    """Raises ConfigError for a size, a base or a pattern of trained parameters that does not fit the model."""
    from domainshuttle.platform.engine.initialization import outline_model  # brings torch and diffusers along
    from domainshuttle.platform.engine.trained_parameters import select_trained

    experts: list[ExpertSection | None] = [*config.experts] or [None]
    for expert in experts:
        outline = outline_model(config.model_of(expert))
        for stage in config.stages:
            select_trained(outline, stage.trained)
