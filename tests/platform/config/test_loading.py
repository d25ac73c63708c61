"""Configuration: every mistake is answered with the key, the value and the remedy, without torch or Ray.

Run: python -m pytest tests/platform/config/test_loading.py
"""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from domainshuttle.platform.config.loading import load_config, load_corpora
from domainshuttle.platform.config.schema import ConfigError, CorporaConfig, RunConfig


def test_the_shipped_demo_loads_by_name_and_by_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[3]
    by_path = load_config(str(root / "configs" / "demo.yaml"))
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").digest() == by_path.digest()
    assert load_config("configs/demo.yaml").digest() == by_path.digest()
    assert Path(load_config("demo").output) == tmp_path / "demo" / "runs"


def test_the_hours_demo_is_the_demo_with_more_and_shares_nothing_with_it() -> None:
    short, long = load_config("demo"), load_config("demo-hour")
    assert (long.name, Path(long.output).parent.name, Path(long.data).parent.name) == ("demo-hour",) * 3
    assert long.model == short.model and list(long.corpora) == list(short.corpora)
    for one, other in zip(short.stages, long.stages, strict=True):
        assert other.duration.planned_steps > 2 * one.duration.planned_steps
        assert other.model_copy(update={"steps": one.steps}) == one
    drawn = [corpus.build for corpus in long.corpora.values()]
    same = {(one.identities, one.held_out, one.seed) for one in drawn}  # type: ignore[union-attr]
    assert len(same) == 1  # or a subject that is held out would be one of another corpus


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.stage1.stps=3", "stages.1.stps: unknown key; did you mean 'steps'"),
        ("clster.workers=3", "clster: unknown key; did you mean 'cluster'"),
        ("stages.stage1.loss.cross_pair_wieght=1", "did you mean 'cross_pair_weight'"),
        ("cluster.workers=0", r"cluster.workers: .*greater than 0.*given: 0"),
        (
            "cluster.workers=3",
            "global_batch=64 can't be shared by cluster.workers=3 x micro_batch=32: use a multiple of 96",
        ),
        ("stages.stage1.mixture={sprite-images: 1}", "did you mean 'sprites-images'"),
        ("corpora.sprites-images.buckets=[1x64x60]", "multiples of 16"),
        ("corpora.sprites-images.build.builder=cats", "build.builder: there is no 'cats'"),
        ("stages.nine.steps=3", "'stages.nine' is no entry; known: base, stage1, stage2"),
        ("seed", "expected key.key=value"),
        ("model.base=wan", "not both and not neither"),
        ("encoders.text_len=32", "model.size.text_len=48 must equal encoders.text_len=32"),
        ("stages.base.loss.cross_pair_weight=0.1", "needs references"),
        ("stages.1.name=base", "same name twice"),
    ],
)
def test_mistakes_are_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", [override])


def test_all_faults_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", ["cluster.workers=-1", "checkpoint.evry=5", "seed=x"])
    assert len(str(caught.value).splitlines()) == 4


def test_overrides_reach_lists_by_name_and_values_are_yaml() -> None:
    config = load_config("demo", ["stages.stage2.steps=7", "stages.0.betas=[0.8, 0.9]", "cluster.address=null"])
    assert config.stages[2].steps == 7
    assert config.stages[0].betas == (0.8, 0.9)
    assert config.cluster.address is None


def test_the_resolved_file_is_the_same_run() -> None:
    config = load_config("demo", ["seed=11"])
    again = RunConfig.model_validate(yaml.safe_load(config.to_yaml()))
    assert again == config
    assert again.digest() == config.digest()


def test_the_digest_follows_what_is_learned_and_nothing_else() -> None:
    digest = load_config("demo").digest()
    for same in (
        "cluster.max_failures=9",
        "tracking.every=3",
        "checkpoint.keep=5",
        "output=elsewhere",
        # what errors tell a person to change and then to resume
        "guard.spike_factor=20",
        "guard.hang_seconds=3600",
        "engine.activations.mode=full",
        "engine.compile=inductor",
        "engine.offload_optimizer=true",
        "engine.attention_backend=native",
        "engine.persistent_parameters=5",
        "stages.stage1.micro_batch=8",
    ):
        assert load_config("demo", [same]).digest() == digest, same
    for other in (
        "seed=8",
        "stages.stage1.steps=9",
        "stages.stage2.learning_rate=0.5",
        "encoders.video=wan",
        "engine.ema=0.9",
    ):
        assert load_config("demo", [other]).digest() != digest, other


def test_what_decides_is_known_by_key() -> None:
    decisive = load_config("demo").decisive()
    assert decisive["stages.stage2.learning_rate"] > 0
    assert not any(key.startswith(("guard", "cluster", "engine.activations")) for key in decisive)


@pytest.mark.parametrize(
    ("key", "place", "remedy"),
    [
        ("data", "s3://KEY:hunter2@bucket/x", "AWS_SECRET_ACCESS_KEY"),
        ("output", "s3://KEY:hunter2@bucket/x", "AWS_SECRET_ACCESS_KEY"),
        ("checkpoint.store", "s3://KEY:hunter2@bucket/x", "AWS_SECRET_ACCESS_KEY"),
        ("tracking.uri", "https://anna:hunter2@mlflow", "MLFLOW_TRACKING_PASSWORD"),
        ("tracking.uri", "postgresql://anna:hunter2@db/mlflow", "PGPASSWORD"),
    ],
)
def test_secrets_are_no_part_of_a_configuration(key: str, place: str, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} has access keys in it.*{remedy}") as caught:
        load_config("demo", [f"{key}={place}"])
    assert "hunter2" not in str(caught.value)


def test_folders_of_weights_come_out_absolute_and_ids_of_the_hub_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wan" / "vae").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    config = load_config("demo", ["encoders.video=wan/vae", "encoders.text=google/umt5", "model={base: wan}"])
    assert config.model.base == str(tmp_path / "wan")
    assert (config.encoders.video, config.encoders.text) == (str(tmp_path / "wan" / "vae"), "google/umt5")
    experts = load_config("demo", ["experts=[{name: high, base: wan}, {name: low, base: Wan-AI/low}]"]).experts
    assert [expert.base for expert in experts] == [str(tmp_path / "wan"), "Wan-AI/low"]


def test_a_store_of_metrics_is_where_the_command_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for scheme in ("sqlite", "sqlite+pysqlite"):
        config = load_config("demo", [f"tracking.uri={scheme}:///all.db?timeout=20"])
        assert config.tracking_uri == f"{scheme}:///{tmp_path}/all.db?timeout=20"
        assert config.digest() == load_config("demo").digest()
    with pytest.raises(ConfigError, match=r"tracking\.uri: .*would open another file"):
        load_config("demo", ["tracking.uri=sqlite:///50%.db"])


@pytest.mark.parametrize(
    ("uri", "told"),
    [
        ("mlruns", "expected http://HOST:5000 or sqlite"), ("./mlruns", "expected"), ("file:///x", "expected"),
        ("localhost:5000", "expected"), ("127.0.0.1:5000", "expected"), ("http:/host:5000", "names no host"),
        ("http://", "names no host"), ("http://host:port", "[Pp]ort"), ("http://host:99999", "[Pp]ort"),
        ("sqlite://mlflow.db", "expected"), ("sqlite:/mlflow.db", "expected"), ("foo://host", "expected"),
    ],
)  # fmt: skip
def test_what_is_neither_a_server_nor_a_store_is_refused(uri: str, told: str) -> None:
    with pytest.raises(ConfigError, match=f"tracking.uri: .*{told}"):
        load_config("demo", [f"tracking.uri={uri}"])
    for good in ("http://host:5000/team", "https://[::1]:5000", "postgresql+psycopg2://db/mlflow", "databricks"):
        assert load_config("demo", [f"tracking.uri={good}"]).tracking_uri == good


@pytest.mark.parametrize(
    "override",
    [
        "output=$HOME/runs", "data=${SCRATCH}/data", "checkpoint.store=/mnt/$USER", "checkpoint.scratch=$TMPDIR",
        "encoders.video=$MODELS/vae", "corpora.clips.build={builder: uno, folder: $DATA, samples: 8}",
    ],
)  # fmt: skip
def test_a_variable_that_no_shell_has_filled_in_is_refused(override: str) -> None:
    with pytest.raises(ConfigError, match="is not filled in here"):
        load_config("demo", [override])


def test_a_folder_that_has_such_a_name_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "$HOME").mkdir()
    assert load_config("demo", [f"output={tmp_path}/$HOME"]).output == f"{tmp_path}/$HOME"


def test_a_place_with_a_character_that_no_file_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="no file has such a character"):
        load_config("demo", ["data=a\0b"])


def test_how_samples_are_read_may_change_on_resume() -> None:
    assert load_config("demo", ["loader.most_bad=0.05", "loader.threads=4"]).digest() == load_config("demo").digest()


def test_an_elastic_group_needs_only_some_sizes_that_share_the_batch() -> None:
    config = load_config("demo", ["cluster.workers=[1, 3]"])  # three share no batch of 64
    assert config.worker_sizes(config.stages[1]) == [1, 2]
    assert load_config("demo").worker_sizes(config.stages[1]) == [2]


def test_a_worker_has_longer_for_a_save_than_saves_may_take() -> None:
    assert load_config("demo", ["guard.hang_seconds=60", "checkpoint.timeout=100"]).grace_seconds == 320
    assert load_config("demo", ["guard.hang_seconds=6000", "checkpoint.timeout=100"]).grace_seconds == 6000


def test_flattened_has_dotted_keys() -> None:
    flat = load_config("demo").flattened()
    assert flat["stages.stage1.global_batch"] == 64
    assert flat["corpora.sprites-images.build.kind"] == "image"


@pytest.mark.parametrize("text", ["- 1\n- 2", "a: [", "name: x"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"run\.yaml"):
        load_config(str(path))


def test_a_missing_file_names_the_shipped_ones() -> None:
    with pytest.raises(ConfigError, match=r"demo"):
        load_config("nowhere.yaml")


def test_a_mistake_is_answered_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom domainshuttle.platform.config.loading import load_config\n"
        "from domainshuttle.platform.config.schema import ConfigError\n"
        "try: load_config('demo', ['sed=1'])\nexcept ConfigError as e: print(e)\n"
        "print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "did you mean 'seed'" in run.stdout
    assert run.stdout.strip().endswith("False False")


CORPORA = sorted((Path(__file__).resolve().parents[3] / "configs" / "corpora").glob("*.yaml"))


@pytest.mark.parametrize("path", CORPORA, ids=lambda path: path.stem)
def test_shipped_corpora_load_by_path_and_by_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_path = load_corpora(str(path))
    monkeypatch.chdir(tmp_path)
    by_name = load_corpora(f"corpora/{path.stem}")
    assert isinstance(by_name, CorporaConfig) and by_name.corpora.keys() == by_path.corpora.keys()
    assert by_name.data == str(tmp_path / "data")
    recipe = load_config("wan2.1-t2v-14b")
    for name, section in by_name.corpora.items():
        assert section.build is not None
        assert str(tmp_path) in section.build.folder  # workers run in folders of their own
        if name != "mine":  # what the recipe trains on, as it wants it
            assert (section.buckets, section.fps) == (recipe.corpora[name].buckets, recipe.corpora[name].fps)


def test_the_papers_corpora_have_its_counts() -> None:
    one, two = (load_corpora(f"corpora/paper-stage{stage}").corpora.values() for stage in (1, 2))
    assert sum(section.build.samples for section in one) == 200_000
    assert sum(section.build.samples for section in two) == 750_000


def test_mistakes_in_corpora_are_named() -> None:
    assert isinstance(load_corpora("demo"), RunConfig)
    for override, message in (
        ("corpora.uno.build.sampels=3", "did you mean 'samples'"),
        ("corpora.uno.build.builder=unoo", "there is no 'unoo'; did you mean 'uno'"),
        ("corpora.uno.build.folder=s3://x/y", "download them first"),
        ("stages=[]", "model: missing"),
        ("nothing=1", "nothing: unknown key; known: data"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_corpora("corpora/uno", [override])


@pytest.mark.parametrize("key", ["data", "output"])
def test_a_jobs_copy_of_its_working_directory_is_no_place_for_a_run(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "working_dir_files" / "_ray_pkg_029f88d5ecc55e1e"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    stays = [f"{one}={tmp_path / one}" for one in ("data", "output")]
    load_config("demo", stays)
    with pytest.raises(
        ConfigError, match=rf"{key}=mine/{key} is a folder of this job's working directory.*--set {key}="
    ):
        load_config("demo", [*stays, f"{key}=mine/{key}"])


def test_workers_that_share_tokens_are_counted_as_one() -> None:
    shared = ["engine.sequence_parallel=2"]
    assert load_config("demo", ["cluster.workers=[1, 8]", *shared]).worker_sizes(load_config("demo").stages[1]) == [
        2, 4,
    ]  # fmt: skip
    config = load_config("demo", ["cluster.workers=4", *shared])
    plain = load_config("demo", ["cluster.workers=2"])
    for stage in config.stages:
        assert config.accumulation(stage, 4) == plain.accumulation(stage, 2)
    assert config.digest() == plain.digest()  # a run may go on with another number
    with pytest.raises(ConfigError, match=r"cluster\.workers must be a multiple of 2, or workers of which there are 2"):
        load_config("demo", ["cluster.workers=1", *shared])
    with pytest.raises(ConfigError, match=r"sequence_parallel needs encoded corpora"):
        load_config("demo", ["cluster.workers=2", "encoders.live={actors: 1}", *shared])
