"""Whole runs through the command line: resuming, stopping, refusing, starting from weights, and what is recorded."""

import contextlib
import json
import os
import shutil
import signal
import subprocess

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.checkpoint.reader import CheckpointReader
from jaxllm.checkpoint.run_folder import RunFolder
from jaxllm.config import load_config
from jaxllm.spec import spec_from_json
from jaxllm.train.records.metrics_file import read_metrics
from jaxllm.train.setup import make_setup
from jaxllm.train.weights import RunWeights
from tests.train.runs import assert_same_records, losses, num_records, wait_for, write_documents

NO_EVALUATION = {"data__heldout": [], "eval__every": None}


@pytest.fixture
def run(world, start, tmp_path):
    """Run a config to its end: (name, *arguments, code=0, **overrides) -> (run folder, what it printed)."""

    def to_end(name, *arguments, code=0, **overrides):
        folder = tmp_path / name
        config = world.write_config(folder, **overrides)
        command = start(f"{folder}.out", "train", "--config", config, *arguments)
        assert command.wait() == code, command.text
        return folder, command.text

    return to_end


@pytest.fixture
def copied(undisturbed, tmp_path):
    """A copy of the undisturbed run under the name "run"."""
    return shutil.copytree(undisturbed, tmp_path / "run")


def steps_of(folder):
    return CheckpointReader(folder / "checkpoints").steps()


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def refusal(text):
    """Return the one message of a refused command."""
    assert text.count("jaxllm: error:") == 1 and "Traceback" not in text, text
    return text.partition("jaxllm: error:")[2]


def test_a_finished_run_has_each_step_once_and_trains_no_more(copied, run):
    assert [step for step, _ in losses(copied)] == list(range(1, 25))
    assert [step for step, _ in losses(copied, "eval")] == [8, 16, 24]
    assert losses(copied)[-1][1] < losses(copied)[0][1] - 0.5
    before, records = files_of(copied / "checkpoints"), (copied / "metrics.jsonl").read_bytes()
    _, text = run("run")
    assert "24 of 24 steps are done already" in text
    assert (files_of(copied / "checkpoints"), (copied / "metrics.jsonl").read_bytes()) == (before, records)


def test_evaluation_covers_every_heldout_token(copied, world):
    texts = [json.loads(line)["text"] for line in (world.folder / "heldout.jsonl").read_text().splitlines()]
    tokenizer = jaxllm.load(copied).tokenizer
    row = next(row for row in read_metrics(copied / "metrics.jsonl") if row["kind"] == "eval")
    assert row["tokens"] == sum(len(tokenizer.encode(text)) + 1 for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    np.testing.assert_allclose(row["perplexity"], np.exp(row["loss"]))
    np.testing.assert_allclose(row["bits_per_byte"], row["loss"] * row["tokens"] / np.log(2) / num_bytes)


def test_what_is_free_to_change_resumes(run, copied, undisturbed):
    _, text = run(
        "run", train__steps=26, mesh={"fsdp": 1}, log={"every": 100, "tensorboard": False}, checkpoint__every=5
    )
    assert "resuming at step 24" in text and "done: 26 steps" in text
    assert losses(copied)[:24] == losses(undisturbed)
    assert [step for step, _ in losses(copied)] == list(range(1, 27))


def test_a_signal_saves_and_the_same_command_goes_on(world, start, undisturbed, tmp_path):
    folder = tmp_path / "run"
    arguments = ("train", "--config", world.write_config(folder, data__cache_dir=None))
    command = start(f"{folder}.out", *arguments)
    wait_for((folder / "config.yaml").is_file)
    command.kill(signal.SIGTERM)
    assert command.wait() == 75, command.text
    assert "stopped by SIGTERM before the first step" in command.text or steps_of(folder)
    half_written = folder / "data" / ".killed.0"
    half_written.mkdir(parents=True)

    command = start(f"{folder}.out", *arguments)
    wait_for(lambda: num_records(folder) >= 2)
    command.kill(signal.SIGINT)
    assert command.wait() == 75, command.text
    last = losses(folder)[-1][0]
    assert last < 24 and steps_of(folder)[-1] == last
    assert f"stopped by SIGINT: step {last} of 24 is saved" in command.text
    assert not half_written.exists()

    command = start(f"{folder}.out", *arguments)
    assert command.wait() == 0, command.text
    assert_same_records(folder, undisturbed)


def test_an_evaluation_cut_short_is_made_up_for(run, copied, undisturbed):
    lines = (copied / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copied / "metrics.jsonl").write_text("".join(lines[:-1]))
    run("run")
    assert_same_records(copied, undisturbed)


def test_another_config_is_refused_by_key(run, copied):
    before = files_of(copied)
    _, text = run("run", code=2, optimizer__learning_rate=2e-3, seed=1, train__steps=30)
    assert "holds a run with another config" in refusal(text)
    assert "optimizer.learning_rate: 0.001 -> 0.002" in text and "seed: 0 -> 1" in text and "train.steps" not in text
    assert files_of(copied) == before


def test_a_damaged_checkpoint_is_refused_until_another_one_is_asked_for(run, copied, undisturbed):
    newest = copied / "checkpoints" / "24"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    _, text = run("run", code=2)
    assert "damaged checkpoint" in refusal(text) and "--from-step 16" in text
    assert "there are 24, 16" in refusal(run("run", "--from-step", 5, code=2)[1])
    _, text = run("run", "--from-step", 16)
    assert "resuming at step 16" in text and "dropped 9 records of steps after 16" in text
    assert_same_records(copied, undisturbed)


def test_a_run_whose_model_or_tokenizer_became_another_is_refused(run, copied, world, tmp_path):
    raw = json.loads((world.folder / "spec.json").read_text())
    raw["position"]["theta"] = 5e5
    (tmp_path / "spec.json").write_text(json.dumps(raw))
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace(str(world.folder / "spec.json"), str(tmp_path / "spec.json")))
    _, text = run("run", code=2, model__name=str(tmp_path / "spec.json"))
    assert "position: found" in refusal(text)


def test_starting_from_weights(run, copied, undisturbed):
    checkpoint = str(undisturbed / "checkpoints" / "16")
    folder, text = run("second", "--init-from", checkpoint, train__steps=1, **NO_EVALUATION)
    assert f"weights from {checkpoint}" in text
    # The first update has rate 0 in the warm-up, so step 1 shows the loss of the weights as they came.
    assert losses(folder)[0][1] < losses(undisturbed)[0][1] - 0.5
    _, text = run("second", "--init-from", checkpoint, train__steps=2, **NO_EVALUATION)
    assert "resuming at step 1" in text
    _, text = run("second", "--init-from", undisturbed, code=2, train__steps=3, **NO_EVALUATION)
    assert f"began with {checkpoint}" in refusal(text)
    assert "began with random weights" in refusal(run("run", "--init-from", checkpoint, code=2)[1])


def test_weights_are_those_of_the_run_the_checkpoint_or_the_published_folder(world, undisturbed, tmp_path):
    setup = make_setup(load_config([world.write_config(tmp_path / "new")]))
    jaxllm.load(undisturbed).save_pretrained(tmp_path / "published")
    reader = CheckpointReader(undisturbed / "checkpoints")
    for source, step in ((undisturbed, 24), (undisturbed / "checkpoints" / "16", 16), (tmp_path / "published", 24)):
        found = RunWeights(setup, str(source)).model()
        expected = reader.restore_params(setup.state.params, step)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert a.sharding == b.sharding
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
    other = world.write_config(tmp_path / "other", model__name="qwen-mini")
    message = "tokenizer|weights of another model:.*\n.*vocab_size: found 320"
    with pytest.raises(jaxllm.InputError, match=message):
        RunWeights(make_setup(load_config([other])), str(undisturbed)).model()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_documents(run):
    broken = {"optimizer": {"learning_rate": 1e38, "clip_norm": None}, "schedule": {"warmup": 3}}
    folder, text = run("run", code=1, checkpoint={"every": 1, "keep_last": 9}, **broken)
    step = losses(folder)[-1][0] + 1
    assert f"step {step} is not finite" in text and f"the checkpoint of step {step - 1} is untouched" in text
    assert "train.jsonl:" in text
    assert steps_of(folder)[-1] == step - 1
    assert f"step {step} is not finite" in (folder / "log.txt").read_text()


def test_batch_ramp_multistep_rates_concatenation_and_a_trace(run):
    options = {
        "train": {"steps": 12, "batch_size": 8, "batch_ramp": {"start": 4, "increment": 4, "samples": 20}},
        "data__packing": "concat",
        "schedule": {"kind": "multistep", "warmup": 2, "total": 12, "boundaries": [0.5], "factors": [0.1]},
        "log__profile": {"start": 2, "steps": 2},
    }
    options |= NO_EVALUATION
    whole, _ = run("whole", **options)
    rows = [row for row in read_metrics(whole / "metrics.jsonl") if row["kind"] == "train"]
    sizes = np.diff([0, *(row["tokens"] for row in rows)]) // 32
    assert sizes.tolist() == [4] * 5 + [8] * 7
    np.testing.assert_allclose([row["learning_rate"] for row in rows], [0, 5e-4, *[1e-3] * 4, *[1e-4] * 6])
    assert list((whole / "profile").rglob("*.xplane.pb"))

    del options["log__profile"]
    options["train"] |= {"steps": 4}
    parts, _ = run("parts", **options)
    options["train"] |= {"steps": 12}
    run("parts", **options)
    assert losses(parts) == losses(whole)


@pytest.mark.slow
def test_wsd_in_tokens(run):
    tokens = 8 * 32
    schedule = {"kind": "wsd", "unit": "tokens", "warmup": 2 * tokens, "total": 8 * tokens, "decay": 4 * tokens}
    folder, _ = run("run", train__steps=8, schedule={**schedule, "floor": 0.0})
    rates = [row["learning_rate"] for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
    np.testing.assert_allclose(rates, np.array([0, 0.5, 1, 1, 1, 0.75, 0.5, 0.25]) * 1e-3)


def test_a_dry_run_shows_shapes_and_text_and_writes_nothing(run, tmp_path):
    folder, text = run("run", "--dry-run", data__cache_dir=None)
    assert "layers/mlp/gate/kernel" in text and "first row begins: '" in text and "memory on a device" in text
    assert not folder.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "run.out", "run.out.status"}


def test_what_is_refused_leaves_nothing_behind(run, world, undisturbed, tmp_path):
    bad = tmp_path / "bad.jsonl"
    write_documents(bad, 3, seed=0)
    bad.write_text(bad.read_text() + '{"no text": 1}\n')
    data = {"data__train": [{"path": str(bad)}], "data__cache_dir": None}
    folder, text = run("run", code=2, **data)
    assert f"{bad}:4" in refusal(text) and not folder.exists()

    folder.mkdir()
    missing = tmp_path / "missing"
    assert str(missing) in refusal(run("run", "--init-from", missing, code=2)[1])
    assert list(folder.iterdir()) == []
    assert "no checkpoint yet" in refusal(run("run", "--from-step", 3, code=2)[1])
    assert "mesh: replica 1 x fsdp 2" in refusal(run("run", code=2, mesh={"fsdp": 2})[1])
    assert list(folder.iterdir()) == []


def test_a_folder_with_other_files_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("do not touch")
    folder, text = run("run", code=2)
    assert "holds other files (thesis.tex)" in refusal(text)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_two_writers(run, copied):
    writer = RunFolder(copied)
    writer.lock()
    before = files_of(copied)
    _, text = run("run", code=2)
    assert f"being written by process {os.getpid()}" in refusal(text)
    assert files_of(copied) == before
    writer.close()


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_one_message(start, world, run, copied, undisturbed):
    shutil.rmtree(copied / "checkpoints" / "24")
    command = start(f"{copied}.out", "train", "--config", world.write_config(copied), file_limit=100_000)
    assert command.wait() == 2
    message = f"{copied}/checkpoints: step 24 could not be saved: File too large; the newest checkpoint is 16\n"
    assert refusal(command.text) == f" {message}"
    assert sorted(path.name for path in (copied / "checkpoints").iterdir()) == ["16"]
    assert losses(copied) == losses(undisturbed)
    run("run")
    assert_same_records(copied, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_fills_up_ends_the_run_with_one_message(start, world, undisturbed, small_disk):
    folder = small_disk / "run"
    arguments = ("train", "--config", world.write_config(folder, checkpoint__every=2))
    command = start(small_disk.parent / "first.out", *arguments)
    wait_for(lambda: steps_of(folder))
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    assert command.wait() == 2, command.text
    message = refusal(command.text)
    assert "No space left" in message or "GB free" in message
    newest = steps_of(folder)[-1]
    filler.unlink()
    command = start(small_disk.parent / "second.out", *arguments)
    assert command.wait() == 0, command.text
    assert f"resuming at step {newest}" in command.text
    assert_same_records(folder, undisturbed)


def test_the_spec_and_tokenizer_of_a_run_are_kept_with_it(undisturbed, world):
    assert spec_from_json((undisturbed / "spec.json").read_text()) == jaxllm.load(undisturbed).spec
    assert jaxllm.load(undisturbed).tokenizer.vocab_size == 300
