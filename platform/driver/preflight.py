"""What is checked before anything is made or a cluster is asked for anything."""

import shlex

from domainshuttle.model.encoder_sources import text_width
from domainshuttle.pipelines.buckets import nearest_shareable
from domainshuttle.pipelines.errors import DataError, counted
from domainshuttle.pipelines.index.alterations import COLUMNS as ALTERATIONS
from domainshuttle.pipelines.index.folder import COMPANION, read_skipped
from domainshuttle.pipelines.index.parts import EMPTY_CAPTION_NAME
from domainshuttle.pipelines.index.selection import CAPTIONED, selected_rows, uncaptioned
from domainshuttle.pipelines.index.spec import CorpusSpec
from domainshuttle.pipelines.index.table import Index, read_metadata
from domainshuttle.pipelines.media.decode import RULES, TRANSFORM
from domainshuttle.pipelines.shards.tensors import tensor_views
from domainshuttle.pipelines.storage.files import exists, open_parquet, read_bytes
from domainshuttle.pipelines.storage.uri import join, redacted
from domainshuttle.platform.config.loading import read_config
from domainshuttle.platform.config.schema import ConfigError, EngineSection, ExpertSection, RunConfig, nearest
from domainshuttle.platform.console import console
from domainshuttle.platform.engine.model_size import model_size
from domainshuttle.platform.engine.trained_parameters import TrainedParameters, trained_of
from domainshuttle.platform.run.folder import Run


def missing_corpora(config: RunConfig) -> list[str]:
    """The corpora that the stages need and that are not there in the form they train on (raw where encoders.live is
    set)."""
    needed = sorted({corpus for stage in config.stages for corpus in stage.mixture})
    return [name for name in needed if not exists(config.corpus(name).index)]


def require_encoded(config: RunConfig) -> None:
    """Raises DataError that names every corpus that the stages need and that is not there in the form they train on
    (raw where encoders.live is set), with the commands; or that is not as the configuration says."""
    if message := no_data(config):
        raise DataError(message)
    require_as_configured(config)


def no_data(config: RunConfig) -> str | None:
    """Which corpora are missing, and the commands that make them; None where all are there."""
    form = config.trained_form
    if missing := missing_corpora(config):
        commands = []
        if any(config.corpora[name].build for name in missing):
            commands.append("domainshuttle data build CONFIG")
        if own := [name for name in missing if not config.corpora[name].build]:
            quoted = shlex.quote(redacted(config.corpus(own[0], "raw").folder))
            commands.append(f"domainshuttle data index {quoted} --corpus {own[0]} ...")
        if form == "encoded":
            commands.append("domainshuttle data encode CONFIG")
        return (
            f"corpora {missing} are not {'encoded' if form == 'encoded' else 'built'} in {redacted(config.data)}. Run: "
            f"{', then '.join(commands)} (or point `data` at a folder that has them)"
        )
    return None


def require_schedule(config: RunConfig) -> None:
    """Raises ConfigError for a stage that ends before its learning rate is reached. A run that began before this was
    asked goes on as it is."""
    if _has_begun(config):
        return
    for stage in config.stages:
        steps = stage.duration.steps
        if steps is not None and stage.warmup_steps > steps:
            raise ConfigError(
                f"stages.{stage.name}.warmup_steps is {stage.warmup_steps}, and the stage ends after "
                f"{counted(steps, 'step')}, at {steps / stage.warmup_steps:.0%} of its learning rate: --set "
                f"stages.{stage.name}.warmup_steps={steps // 10}, or more steps"
            )


def _has_begun(config: RunConfig) -> bool:
    """Whether there is a run of this name and configuration, which has its plan by now."""
    path = Run(config).config_path
    return path.exists() and read_config(path).digest() == config.digest()


def require_as_configured(config: RunConfig) -> None:
    """Raises DataError where a corpus that is there was made otherwise than the configuration says, or a stage's filter
    leaves nothing of it, or names what no sample has; the last not of a run that began before this was asked."""
    missing, begun = missing_corpora(config), _has_begun(config)
    for name in sorted({name for stage in config.stages for name in stage.mixture} - set(missing)):
        _require_as_configured(config, config.corpus(name))
    for stage in config.stages:
        for name, where in stage.where.items():
            if name not in missing:
                selected_rows(config.corpus(name).index, where, known=not begun)
    _require_captions(config, missing)


def _require_captions(config: RunConfig, missing: list[str]) -> None:
    """Raises DataError where a stage would learn from samples without a caption. A run that began before this was asked
    goes on as it is."""
    if Run(config).config_path.exists():
        return
    for stage in config.stages:
        for name in set(stage.mixture) - set(missing):
            where = stage.where.get(name)
            if not (mute := uncaptioned(config.corpus(name).index, where)):
                continue
            filtered = f"({where}) and {CAPTIONED}" if where else CAPTIONED
            again = "" if config.trained_form == "raw" else ", then domainshuttle data encode CONFIG"
            raise DataError(
                f"corpus {name!r}: {mute} of the samples that stage {stage.name} takes have no caption. Let a model "
                "write them: domainshuttle data label CONFIG with labels.labeller=endpoint or transformers"
                f"{again} (docs/datasets.md). Or leave them out: stages.{stage.name}.where: {{{name}: {filtered!r}}}"
            )


def _require_as_configured(config: RunConfig, corpus: CorpusSpec) -> None:
    """Raises DataError where an index was made otherwise than the configuration says, and training would not notice."""
    name, place, found = corpus.name, corpus.index, read_metadata(corpus.index)
    if found.corpus != name:
        raise DataError(
            f"corpus {name!r}: the index in its folder is of corpus {found.corpus!r} ({redacted(place)}): name it "
            f"{found.corpus!r} in the configuration and rename its folder, or make the index again as {name!r}"
        )
    if found.fps != corpus.fps:
        rates = [f"{rate:g}" if rate else "each clip's own" for rate in (found.fps, corpus.fps)]
        raise DataError(
            f"corpus {name!r} was indexed at {rates[0]} frames a second, and corpora.{name}.fps says {rates[1]}: "
            "correct it, or index the corpus again with --fps (nothing is read again) and encode it "
            f"({redacted(place)})"
        )
    buckets = set(open_parquet(place).read(["bucket"]).column("bucket").unique().to_pylist())
    if more := sorted(buckets - set(map(str, corpus.buckets))):
        raise DataError(
            f"corpus {name!r} has samples in buckets {more}, which corpora.{name}.buckets does not list: add them, or "
            f"index the corpus again with those of the configuration ({redacted(place)})"
        )
    if found.stage == "raw":
        _print_live(name, place)
        return
    encoders = config.encoders
    for kind, source, ending in (("video", encoders.video, ""), ("text", encoders.text, f":{encoders.text_len}")):
        identity = str(found.encoders.get(kind, ""))
        if not identity.endswith(ending):
            raise DataError(
                f"corpus {name!r} was encoded with captions of {identity.rpartition(':')[2]} tokens, and "
                f"encoders.text_len is {encoders.text_len}: correct it, or encode the corpus again"
            )
        if not identity.startswith(f"{source}:") and f"{kind}_files" not in found.encoders:
            # it may be the same under another name
            console.print(
                f"Corpus {name} was encoded by {identity}, and encoders.{kind} is {source}: unless they are the same, "
                "encode it again"
            )
    _require_same_transform(name, str(found.encoders.get("transform", "")))


def _require_same_transform(name: str, before: str) -> None:
    """Raises DataError where a corpus was encoded by other rules for pixels; other versions of what carries them out
    are told."""
    if before == TRANSFORM:
        return
    if not before.startswith(RULES):
        raise DataError(
            f"corpus {name!r} was encoded by other rules for pixels ({before or 'it does not say which'}) than they "
            f"are now ({RULES}): encode it again with `domainshuttle data encode CONFIG --overwrite`"
        )
    versions = [set(one.removeprefix(RULES).strip("; ").split("; ")) for one in (before, TRANSFORM)]
    console.print(
        f"Corpus {name} was decoded by {', '.join(sorted(versions[0] - versions[1]))}; here is "
        f"{', '.join(sorted(versions[1] - versions[0]))}. What is encoded stays as it is."
    )


def _print_live(name: str, place: str) -> None:
    """Prints what live encoding changes of a raw corpus's samples, and how many files of it are not read."""
    altered = Index.load(place, ALTERATIONS, verify=False).alterations()
    if changed := altered.sentences():
        console.print(
            f"Corpus {name}, fitted to its buckets: of {counted(altered.samples, 'sample')} {', '.join(changed)}"
        )
    if left := [one for one in read_skipped(place) if one.kind != COMPANION]:
        console.print(
            f"Corpus {name}: not read beside its shards: {counted(len(left), 'file')}; `data inspect` names all"
        )


def require_data(config: RunConfig) -> None:
    """Raises DataError for corpora that are not encoded or not as configured and filters that leave nothing,
    ConfigError for a model of another text encoder and a warm-up that is longer than its stage."""
    require_schedule(config)
    require_encoded(config)
    if config.model.size:
        _require_fit(config, config.model.size.get("text_dim"), config.model.size.get("max_references"))
    if config.sampling is not None and config.sampling.metrics is not None:
        from domainshuttle.platform.evaluation.training_metrics import check_training_metrics  # brings torch along

        check_training_metrics(config)


def require_model(config: RunConfig) -> None:
    """Raises ConfigError for a size, a base, a backend or a pattern of trained parameters that does not fit the
    model."""
    selected_parameters(config)


def selected_parameters(config: RunConfig) -> dict[str, TrainedParameters]:
    """Which parameters each segment trains, of a model that is not built; raises as `require_model`."""
    _require_backends(config.engine, config.cluster.gpus_per_worker > 0)
    experts: list[ExpertSection | None] = [*config.experts] or [None]
    sizes = {expert: model_size(config.model_of(expert)) for expert in experts}
    for size in sizes.values():
        _require_fit(config, size.text_dim, size.max_references)
    require_shareable(config, {size.num_attention_heads for size in sizes.values()})
    return {
        segment.name: trained_of(sizes[segment.expert], segment.stage.trained) for segment in Run(config).segments()
    }


def _require_backends(engine: EngineSection, on_gpu: bool) -> None:
    if engine.attention_backend is not None:
        from domainshuttle.platform.engine.attention_kernels import require_trainable

        require_trainable(engine, on_gpu)
    if engine.kernels == "triton":
        from domainshuttle.model import fused

        if not on_gpu:
            raise ConfigError("engine.kernels=triton needs GPUs (cluster.gpus_per_worker=1): on CPUs leave it out")
        if not fused.available():
            raise ConfigError(
                "engine.kernels=triton: Triton is not installed here: install the extra `kernels` of domainshuttle, or "
                "leave it out"
            )
    if engine.compile is not None:
        import torch

        known = sorted(torch.compiler.list_backends(exclude_tags=()))
        if engine.compile not in known:
            raise ConfigError(
                f"engine.compile={engine.compile!r} is no backend of torch.compile{nearest(engine.compile, known)}"
            )


def require_shareable(config: RunConfig, heads: set[int]) -> None:
    """Raises ConfigError for heads, or frames of a bucket, that can't be divided by the workers that share a sample."""
    sharing = config.engine.sequence_parallel
    if undivided := [count for count in sorted(heads) if count % sharing]:
        could = [size for size in range(2, min(undivided) + 1) if not any(count % size for count in heads)]
        raise ConfigError(
            f"engine.sequence_parallel={sharing} does not divide the model's {undivided[0]} attention heads: use "
            f"{' or '.join(map(str, [1, *could]))}"
        )
    faults = []
    for name in sorted({name for stage in config.stages for name in stage.mixture}):
        for bucket in config.corpus(name).buckets:
            if bucket.reference_tokens % sharing:
                faults.append(
                    f"corpora.{name}.buckets: {bucket} has {bucket.reference_tokens:,} tokens a frame; nearest is "
                    f"{nearest_shareable(bucket, sharing)}"
                )
    if faults:
        raise ConfigError(
            f"engine.sequence_parallel={sharing} does not divide the frames of all buckets: {'; '.join(faults)}. "
            "Change them, then index and encode these corpora again"
        )


def _require_fit(config: RunConfig, text_dim: int | None, max_references: int | None) -> None:
    """Raises ConfigError where a model takes fewer references than the stages show, or other captions than there are;
    None is not known yet."""
    for stage in config.stages:
        if max_references is not None and stage.references > max_references:
            raise ConfigError(
                f"stages.{stage.name}.references={stage.references}, and the model takes max_references="
                f"{max_references}: lower it, or raise model.size.max_references"
            )
    widths = {f"encoders.text={config.encoders.text}": text_width(config.encoders.text)}
    if not config.encoders.live:
        needed = sorted({name for stage in config.stages for name in stage.mixture})
        widths |= {f"corpus {name!r}": _encoded_width(config, name) for name in needed}
    for name, width in widths.items():
        if None not in (width, text_dim) and width != text_dim:
            raise ConfigError(
                f"the captions of {name} have {width} channels, and the model has text_dim={text_dim}: set "
                "model.size.text_dim, or encode with the text encoder of the model's base"
            )


def _encoded_width(config: RunConfig, corpus: str) -> int | None:
    """Channels of an encoded corpus's captions; None where it does not say."""
    place = join(config.corpus(corpus, "encoded").folder, EMPTY_CAPTION_NAME)
    return tensor_views(read_bytes(place), redacted(place))["text"].shape[-1] if exists(place) else None
