"""The whole job, by the commands of a user: two Ray Train workers, ZeRO-3, MLflow, stops, kills, export, clips.

Run: python -m pytest tests/platform/driver/test_training.py
"""

import json
import re
import signal
import subprocess
from pathlib import Path

import numpy as np
import psutil
import pytest
from running import (
    CLI,
    cli,
    environment,
    in_process,
    losses,
    same_weights,
    skip_stage1,
    start,
    submit_job,
    wait_for_step,
    weights,
    workers_of,
)

from domainshuttle.pipelines.index.parts import INDEX_NAME
from domainshuttle.pipelines.index.table import Index
from domainshuttle.pipelines.media.decode import decode_video
from domainshuttle.platform.checkpoint.store import Checkpoint, CheckpointStore
from domainshuttle.platform.config.loading import load_config
from domainshuttle.platform.config.schema import RunConfig
from domainshuttle.platform.run.folder import Run
from domainshuttle.platform.run.ledger import Ledger
from domainshuttle.platform.run.sample_audit import audit_samples
from domainshuttle.platform.tracking.queries import list_artifacts, read_history, read_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_run_ends_with_weights_books_and_one_mlflow_run_a_stage(unbroken: tuple[RunConfig, str]) -> None:
    config, printed = unbroken
    said = [
        *(f"Stage stage1 {what}" for what in ("trains ", "is finished; its weights are in ")),
        *(f"Stage stage2 {what}" for what in ("trains ", "is finished; its weights are in ")),
        "Finished after", "Next: domainshuttle export",
    ]  # fmt: skip
    assert [printed.count(one) for one in said] == [1] * len(said) and sorted(said, key=printed.index) == said
    logs = [log.read_text() for log in (config.run_folder / "logs").glob("attempt-*/rank*.log")]
    assert len(logs) == 2 and not any("None in sys.modules" in log for log in logs)  # MLflow's thread found it hidden
    books = audit_samples(config)
    assert books.planned == books.trained == (4 + 24) * 8
    assert (books.lost, books.repeated, books.recomputed) == (0, 0, 0)
    records = read_runs(config.tracking_uri, [config.tracking.experiment])
    parents = [record for record in records if record.parent is None]
    assert [record.name for record in parents] == ["tiny"]
    assert sorted(record.name for record in records if record.parent == parents[0].id) == ["stage1", "stage2"]
    assert {record.status for record in records} == {"FINISHED"}
    assert [step for step, _ in losses(config, "stage2")] == list(range(1, 25))
    assert parents[0].params["stages.stage2.steps"] == "24"
    stage2 = next(record for record in records if record.name == "stage2")
    for metric in (
        "loss/flow",
        "loss/cross_pair",
        "grad_norm",
        "samples/s",
        "loss/flow/source/clips",
        "gpu_hours/used",
    ):
        assert metric in stage2.metrics, f"{metric} is not among {sorted(stage2.metrics)}"
    # also of what came after the last step, such as the export
    ledger = Ledger(Run(config).ledger_path)
    assert parents[0].metrics["gpu_hours/used"] == pytest.approx(ledger.summary().used, rel=1e-6)
    hours = {record.name: record.metrics["gpu_hours/used"] for record in records if record.parent == parents[0].id}
    assert hours == {name: pytest.approx(ledger.segment_hours(name), rel=1e-6) for name in ("stage1", "stage2")}
    # the schedule's own curve, stage after stage
    curve = read_history(config.tracking_uri, parents[0].id, "loss")
    assert curve == [*losses(config, "stage1"), *((4 + step, loss) for step, loss in losses(config, "stage2"))]


def test_frozen_parameters_stay_and_trained_ones_move(unbroken: tuple[RunConfig, str]) -> None:
    config, _ = unbroken
    before, after = weights(config, "stage1"), weights(config, "stage2")
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    trained = {name for name in before if ".attn1." in name or "_ref" in name}
    # frozen parameters went through bf16, which the first stage's masters did not
    for name in set(before) - trained:
        np.testing.assert_allclose(after[name], before[name], rtol=2**-8, atol=1e-6)
    assert {name for name in moved if ".attn1.to_q.weight" in name}
    assert len(moved & trained) > 0.8 * len(trained)


def test_a_stopped_and_a_killed_run_end_with_the_same_bits(
    tiny: Path, unbroken: tuple[RunConfig, str], users_cluster: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    """By Ctrl-C at a desk, and goes on as a job of a cluster with a dashboard and a token, where a worker dies."""
    whole, _ = unbroken
    other = ["--set", f"output={tiny.parent}/broken", "--set", "cluster.max_failures=2"]
    config = load_config(str(tiny), [f"output={tiny.parent}/broken"])
    run = Run(config)
    skip_stage1(run, whole)  # only stage 2 is to be broken
    process = start(tiny, *other, log=tiny.parent / "broken.log")  # in a cluster that it starts and ends itself
    wait_for_step(process, run, "stage2", 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=300) == 3
    stopped = CheckpointStore(run.checkpoints).newest("stage2")
    assert stopped is not None
    assert 2 < stopped.state.step < 24
    runs_before = {record.name: record.id for record in read_runs(config.tracking_uri, ["tiny"])}

    address, env = users_cluster
    refused = subprocess.run(
        [*CLI, "submit", tiny, "--address", address],
        capture_output=True, text=True, timeout=120, env=environment(HOME=str(tmp_path)), check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "RAY_AUTH_MODE=token" in refused.stderr
    assert "Traceback" not in refused.stderr
    working = tmp_path / "job"
    working.mkdir()
    (working / "tiny.yaml").write_text(tiny.read_text())
    command = ["--working-dir", str(working), "--", "domainshuttle", "train", "tiny.yaml", *other]
    job = submit_job(address, env, tmp_path / "job.log", *command)
    wait_for_step(job, run, "stage2", stopped.state.step + 1)
    workers_of(psutil.Process())[0].kill()
    printed = job.wait(timeout=400), (tmp_path / "job.log").read_text()
    assert printed[0] == 0 and "succeeded" in printed[1], printed[1][-4000:]
    same_weights(config, whole)
    assert losses(config, "stage2") == losses(whole, "stage2")
    assert {record.name: record.id for record in read_runs(config.tracking_uri, ["tiny"])} == runs_before
    books = audit_samples(config)
    assert (books.lost, books.repeated) == (0, 0)
    assert Ledger(run.ledger_path).summary().attempts >= 3
    whole_ones = [found for _, found in CheckpointStore(run.checkpoints).list() if isinstance(found, Checkpoint)]
    assert {found.state.step for found in whole_ones if found.state.segment == "stage2"} == {21, 24}


@pytest.mark.nightly
def test_a_finished_run_is_not_trained_again(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    config, _ = unbroken
    before = weights(config, "stage2")
    # a run that died between its last checkpoint and its weights has only these to write
    segment = Run(config).segment("stage2")
    (segment.weights / "digest.txt").unlink()
    printed = cli("train", tiny)
    assert "Stage stage1 is finished" in printed
    assert "Stage stage2: goes on after step 24" in printed
    assert segment.finished
    after = weights(config, "stage2")
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert audit_samples(config).recomputed == 0


def test_a_name_of_another_run_is_refused(tiny: Path, unbroken: tuple[RunConfig, str]) -> None:
    printed = in_process("train", tiny, "--set", "seed=4", expect=2)
    assert "seed was 3, now 4" in printed
    assert "--fresh" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--resume", "stage2-step00000021"], "--fresh removes what --resume stage2-step00000021 is to go on from"),
        (["--resume", "CHECKPOINT"], "is to go on from: give one of them"),
        (["--stage", "stage2"], "--fresh removes the weights of stage stage1, with which stage stage2 begins"),
        (["--stage", "stge2"], "has no stage 'stge2'"),
    ],
)
def test_nothing_is_removed_for_what_can_not_be(
    more: list[str], message: str, tiny: Path, unbroken: tuple[RunConfig, str]
) -> None:
    run = Run(unbroken[0])
    more = [str(run.checkpoints / "stage2-step00000021") if part == "CHECKPOINT" else part for part in more]
    assert message in " ".join(in_process("train", tiny, "--fresh", *more, expect=2).split())
    assert all(segment.finished for segment in run.segments()) and run.ledger_path.exists()


def test_missing_corpora_are_named_with_the_commands(tiny: Path, tmp_path: Path) -> None:
    printed = in_process("train", tiny, "--set", f"data={tmp_path}", expect=2)
    assert "['clips', 'pictures'] are not encoded" in printed
    assert "domainshuttle data build" in printed
    assert "Traceback" not in printed


def test_too_few_cpus_are_answered_at_once(tiny: Path, cluster_variables: dict[str, str]) -> None:
    printed = cli("train", tiny, "--set", "cluster.cpus_per_worker=64", expect=2, **cluster_variables)
    assert "too few CPUs: this needs 129" in printed
    assert "Traceback" not in printed


def test_export_generate_evaluate_compare_and_status(unbroken: tuple[RunConfig, str], tmp_path: Path) -> None:
    config, _ = unbroken
    run = Run(config)
    exported = tmp_path / "exported"
    assert "Exported stage2" in in_process("export", run.folder, exported)
    assert (exported / "model_index.json").exists()
    picture = tmp_path / "reference.jpg"
    from PIL import Image

    Image.new("RGB", (40, 40), (200, 30, 30)).save(picture)
    clips = tmp_path / "clips"
    size = ("--height", "32", "--width", "32", "--frames", "5", "--steps", "2", "--guidance", "2")
    printed = in_process(
        "generate", exported, "--prompt", "a star", "--reference", f"{picture}:0:object", "--out", clips, *size
    )
    assert "Wrote 1 clip " in printed
    assert decode_video((clips / "clip.mp4").read_bytes(), 5).shape == (5, 32, 32, 3)
    printed = in_process("generate", exported, "--prompt", "a star", "--out", tmp_path / "as-trained")
    assert "1 clip of 32x32, 5 frames at 8 a second, 2 steps, guidance 2, seed 0" in printed
    assert decode_video((tmp_path / "as-trained" / "clip.mp4").read_bytes(), 5).shape == (5, 32, 32, 3)
    assert "holds a pipeline already" in in_process("export", run.folder, exported, expect=2)
    assert "Exported stage2" in in_process("export", run.folder, exported, "--overwrite")
    cases = tmp_path / "cases.jsonl"
    case = {"prompts": "a gear", "seg_meta": [{"seg_file": ["reference.jpg"]}], "domain_code": ["Fantasy Domain"]}
    cases.write_text(json.dumps(case) + "\n" + json.dumps({**case, "prompts": "a box"}) + "\n")
    assert "Wrote 2 clips" in in_process("generate", exported, "--cases", cases, "--out", clips, *size)
    first, second = ((clips / f"cases-000{n}.mp4").read_bytes() for n in (1, 2))
    assert first != second
    cases.write_text(json.dumps({**case, "domain_code": ["Fantsy"]}))
    assert "line 1" in in_process("generate", exported, "--cases", cases, expect=2)

    out = tmp_path / "evaluation"
    in_process("evaluate", exported, "--run", run.folder, "--out", out)
    result = json.loads((out / "identity.json").read_text())
    assert result["clips"] == 8
    assert result["chance"] == 0.25
    assert 0 <= result["own"] <= 1
    assert Image.open(out / "grid.png").width > 500
    assert (out / "grid.mp4").stat().st_size > 1000
    records = {record.name: record for record in read_runs(config.tracking_uri, ["tiny"])}
    assert records["stage2"].metrics["evaluation/identity_own"] == result["own"]
    hues = records["stage2"].metrics
    assert (
        hues["evaluation/hue_identity_low"] <= hues["evaluation/hue_identity"] <= hues["evaluation/hue_identity_high"]
    )
    assert "evaluation/report/index.html" in list_artifacts(config.tracking_uri, records["stage2"].id, "evaluation")

    page = tmp_path / "compare.html"
    table = in_process("compare", "tiny", "--uri", config.tracking_uri, "--page", page)
    assert "stage1" in table
    assert "stage2" in table
    assert page.read_text().count("<tr") >= 4
    status = in_process("status", run.folder)
    assert "24 of 24" in status
    assert "goodput" in status


def test_plan_and_inspect_show_the_run(tiny: Path, tmp_path: Path) -> None:
    printed = in_process("plan", tiny)
    assert "stage2" in printed
    assert "0.1 cross-pair" in printed
    # two latent frames of 2 x 2 tokens, and two references of as many a frame
    assert re.search(r"stage2 +│ 5x32x32 +│ +24 │ +100.0% │ +8 │ +16 │", printed)
    # 24 steps of 8 pass 8 times over 24 clips, and 3 times over them and 40 pictures
    by_counts = in_process("plan", tiny, "--set", "stages.stage2.mixture=[pictures, clips]")
    assert re.search(r"stage2 +│ +24 │ +8 │ clips, pictures by sample counts +│ +3\.00 │", by_counts)
    config = load_config(str(tiny))
    lengths = Index.load(f"{config.corpus('clips', 'encoded').folder}/{INDEX_NAME}").column("caption_length")
    left = int((lengths > np.median(lengths)).sum())
    assert 0 < left < 24
    fewer = in_process("plan", tiny, "--set", f"stages.stage2.where={{clips: caption_length > {np.median(lengths)}}}")
    assert f"{24 / -(-left // 8):.2f} │" in fewer  # 24 steps by the whole steps that a pass takes
    for verb, code in (("plan", 2), ("train", 2)):  # before the first stage is trained, not after it
        printed = in_process(
            verb, tiny, "--set", "name=none", "--set", "stages.stage2.where={clips: frames > 5}", expect=code
        )
        assert "leaves none of the 24 samples of corpus 'clips'" in printed and "Traceback" not in printed
    # an index that was made otherwise than the configuration says is not trained on
    for changes, message in (
        (["corpora.clips.fps=12"], "was indexed at each clip's own frames a second, and corpora.clips.fps says 12"),
        (["corpora.clips.buckets=[5x48x48]"], "has samples in buckets ['5x32x32']"),
        (["encoders.text_len=40", "model.size.text_len=40"], "captions of 48 tokens, and encoders.text_len is 40"),
    ):
        refused = in_process("train", tiny, *(part for one in changes for part in ("--set", one)), expect=2)
        assert message in " ".join(refused.split())
    nowhere = in_process("plan", tiny, "--set", f"data={tmp_path}")
    assert "No data yet: corpora ['clips', 'pictures'] are not encoded" in nowhere
    folder = load_config(str(tiny)).corpus("clips", "raw").folder
    sheet = tmp_path / "sheet.png"
    printed = in_process("data", "inspect", folder, "--sheet", sheet, "--where", "frames > 1")
    assert re.search(r"5x32x32 +24", printed)
    from PIL import Image

    assert Image.open(sheet).height == 32 + 8 * (128 + 22)
