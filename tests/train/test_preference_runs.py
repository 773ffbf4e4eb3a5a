"""Runs of the preference stages as processes: killed and resumed, from one stage to the next, and refused."""

import json
import random

import numpy as np
import pytest

import jaxllm
from jaxllm.train.records.metrics_file import read_metrics
from tests.train.runs import WORDS, assert_same_records, wait_for
from tests.train.test_multiprocess import assert_near, end_with, launch

STEPS = 7
SHARED = {
    "data__seq_len": 128,
    "optimizer__learning_rate": 1e-3,
    "schedule__warmup": 0,
    "schedule__total": None,
    "train__steps": STEPS,
    "checkpoint__every": 3,
    "eval__every": None,
    "train__batch_size": 4,
}


def write_pairs(path, count, seed):
    """Write pairs in which the better answer has animals and the worse one has none."""
    rng = random.Random(seed)
    rows = [
        {
            "prompt": " ".join(rng.choices(WORDS, k=3)),
            "chosen": " ".join(rng.choices(("cat", "dog", "bird"), k=3)),
            "rejected": " ".join(rng.choices(("red", "old", "house"), k=3)),
            "margin": rng.choice(("better", "negligible")),
        }
        for _ in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def pairs(world):
    for name, count, seed in (("pairs", 40, 0), ("heldout_pairs", 6, 1)):
        write_pairs(world.folder / f"{name}.jsonl", count, seed)
    return {
        "data__train": [{"path": str(world.folder / "pairs.jsonl")}],
        "data__heldout": [{"path": str(world.folder / "heldout_pairs.jsonl")}],
    }


@pytest.fixture
def run(world, start, pairs, undisturbed, tmp_path):
    def run(name, stage, *, code=0, wait=True, **options):
        weights = {"model__weights": str(undisturbed)} | SHARED | pairs | options
        config = world.write_config(tmp_path / name, stage=stage, **weights)
        command = start(tmp_path / f"{name}.out", "train", "--config", config)
        if not wait:
            return command
        assert command.wait() == code, command.text
        return tmp_path / name, command.text

    return run


def test_a_killed_dpo_run_with_a_precomputed_reference_goes_on_exactly(run, tmp_path, world):
    options = {"dpo": {"reference": "precomputed"}}
    whole, text = run("whole", "dpo", **options)
    assert "reference: 40 pairs" in text
    tables = {file: np.load(file) for file in (world.folder / "cache").glob("reference-*")}
    for file, table in tables.items():
        # As a kill in the middle of the pass leaves it.
        np.save(file, np.where(np.arange(len(table))[:, None] < len(table) // 2, table, np.nan).astype(np.float32))
    command = run("killed", "dpo", wait=False, **options)
    wait_for((tmp_path / "killed" / "checkpoints" / "3").is_dir)
    command.kill()
    command.wait()
    killed, text = run("killed", "dpo", **options)
    assert "resuming at step" in text and "reference:" not in text and len(tables) == 2
    for file, table in tables.items():
        np.testing.assert_array_equal(np.load(file), table)
    assert_same_records(killed, whole)
    first, *_, last = read_metrics(killed / "metrics.jsonl")
    assert first["reference_distance"] < 1e-5
    assert last["kind"] == "eval" and last["accuracy"] > 0.5 and last["loss"] < np.log(2)


def test_a_strict_run_stops_at_a_warning_saved_and_goes_on_when_started_again(run):
    """What parts the policy from a reference that was computed before is rounding alone."""
    options = {
        "dpo": {"reference": "precomputed"},
        "optimizer__learning_rate": 1e-30,
        "health": {"strict": True},
        "data__heldout": [],
    }
    _, text = run("strict", "dpo", code=1, **options)
    assert "warning: step 4: reference_equals_policy: " in text
    assert f"stopped because of the warning above (health.strict): step 5 of {STEPS} is saved" in text
    _, text = run("strict", "dpo", **options)
    assert "resuming at step 5" in text and f"done: {STEPS} steps" in text and "warning" not in text


def test_a_reward_model_goes_on_from_another_one_and_tells_good_from_bad(run):
    first, _ = run("first", "reward")
    second, _ = run("second", "reward", model__weights=str(first), ranking={"margins": "small"}, train__steps=1)
    model = jaxllm.load_reward_model(first)
    asked = {"role": "user", "content": "the old house"}
    good, bad = ([asked, {"role": "assistant", "content": text}] for text in ("cat dog bird", "red old house"))
    scores = model.score([good, bad])
    assert scores[0] > scores[1] + 0.5
    evaluations = [row for row in read_metrics(second / "metrics.jsonl") if row["kind"] == "eval"]
    assert evaluations[0]["accuracy"] > 0.9 and {"accuracy_better", "accuracy_negligible"} <= evaluations[0].keys()


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["reward", "dpo"])
def test_two_processes_train_as_one(run, start, world, pairs, undisturbed, tmp_path, stage):
    options = {"dpo": {"reference": "precomputed"}} | SHARED | pairs | {"model__weights": str(undisturbed)}
    alone, _ = run("alone", stage, **options)
    for file in (world.folder / "cache").glob("reference-*"):
        file.unlink()
    end_with(launch(start, world.write_config(tmp_path / "both", stage=stage, **options), 2), 0)
    assert_near(tmp_path / "both", alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data__packing": "concat"}, "data.packing: stage 'dpo' keeps examples apart"),
        ({"dpo": {"variant": "ipo", "label_smoothing": 0.1}}, "dpo.label_smoothing: dpo.variant 'ipo' has none"),
        ({"model__weights": None}, "model.weights: found none, but the run needs a reference"),
    ],
)
def test_bad_runs_are_refused(run, tmp_path, options, message):
    folder, text = run("refused", "dpo", code=2, **options)
    assert message in text and not folder.exists()
