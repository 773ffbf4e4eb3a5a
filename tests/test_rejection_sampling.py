"""Rejection sampling: the best answers as rows to fine-tune on, interrupted anywhere, over several rounds."""

import json

import pytest

import jaxllm
from jaxllm.config import load_config
from jaxllm.data.rows import detect_kind, read_row
from jaxllm.spec import spec_to_json, tiny
from jaxllm.tokenizers.train import train_bpe
from jaxllm.train.rollouts.best_of import sample_best
from jaxllm.train.rollouts.sampled_rows import best_of, read_rows
from tests.saved_runs import save_run
from tests.tiny_models import random_params

PROMPTS = 5


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """The path of a config that has every prompt answered four times."""
    folder = tmp_path_factory.mktemp("sampling")
    spec = tiny(jaxllm.spec("llama2-70b"), vocab_size=288)
    tokenizer = train_bpe(["the cat sees a bird and a dog"] * 9, vocab_size=272)
    tokenizer.save(folder / "tokenizer")
    (folder / "spec.json").write_text(spec_to_json(spec))
    weights = save_run(folder / "policy", spec, random_params(spec, scale=0.05), tokenizer=tokenizer)
    rows = [{"prompt": f"the cat {number}", "answer": "a bird"} for number in range(PROMPTS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "run_dir": str(folder / "run"),
        "stage": "grpo",
        "tokenizer": str(folder / "tokenizer"),
        "model": {"name": str(folder / "spec.json"), "weights": weights, "compute_dtype": "float32"},
        "data": {"train": [{"path": str(folder / "prompts.jsonl")}], "seq_len": 128},
        "rollout": {"prompts": 2, "samples": 8, "max_new_tokens": 64},
        "rewards": [{"kind": "function", "path": "tests.test_rejection_sampling:distinct"}],
        "train": {"steps": 2, "batch_size": 8},
    }
    (folder / "config.yaml").write_text(json.dumps(options))
    return folder / "config.yaml"


def distinct(completions):
    """Reward different letters."""
    return [float(len(set(each.response))) for each in completions]


@pytest.fixture(scope="module")
def first(config, tmp_path_factory):
    """The output of a first round, and what became of the prompts."""
    output = tmp_path_factory.mktemp("first") / "best.jsonl"
    return output, sample_best(load_config([config]), output)


def test_rows_are_the_best_answers_that_ended(first):
    output, outcome = first
    rows = read_rows(output)
    assert outcome.written == len(rows) and outcome.written + outcome.unanswered == PROMPTS and len(rows) >= 2
    assert outcome.mean_best >= outcome.mean_score > 0
    for row in rows:
        reply = row["messages"][-1]
        assert row["score"] == max(row["scores"]) == row["parts"]["function"] == len(set(reply["content"]))
        assert reply["role"] == "assistant" and row["origin"].split(":")[-1].isdigit() and row["round"] == 1
        dialogue = read_row(row, detect_kind(row, "sft"))
        assert [message["content"] for message in dialogue.messages] == [m["content"] for m in row["messages"]]
    assert not list(output.parent.glob("*.partial")) and not list(output.parent.glob("*.tmp"))


def test_what_was_interrupted_goes_on_exactly(first, config, tmp_path):
    output = tmp_path / "best.jsonl"

    def stop(done, total):
        raise KeyboardInterrupt(f"{done} of {total}")

    with pytest.raises(KeyboardInterrupt, match=f"2 of {PROMPTS}"):
        sample_best(load_config([config]), output, progress=stop)
    journal = tmp_path / "best.jsonl.partial"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 and not output.exists()
    # A kill in the middle of a line; that prompt is answered again.
    journal.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    with pytest.raises(jaxllm.InputError, match="was begun with another configuration"):
        sample_best(load_config([config], ["seed=1"]), output)
    seen = []
    sample_best(load_config([config]), output, progress=lambda done, total: seen.append(done))
    assert seen == [3, 5] and output.read_text() == first[0].read_text()
    with pytest.raises(jaxllm.InputError, match="exists already"):
        sample_best(load_config([config]), output)


def test_better_answers_of_earlier_rounds_stay(first, config, tmp_path):
    rows = read_rows(first[0])
    rows[0]["score"] = 1e6
    (tmp_path / "earlier.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "second.jsonl"
    sample_best(load_config([config]), output, round_number=2, earlier=[tmp_path / "earlier.jsonl"])
    found = {row["origin"]: row for row in read_rows(output)}
    assert found[rows[0]["origin"]] == rows[0]
    assert all(found[row["origin"]]["score"] >= row["score"] for row in rows)
    assert {row["round"] for row in found.values()} <= {1, 2} and len(found) >= len(rows)
    assert (
        best_of([{"messages": ["a", "x"], "score": 1}, {"messages": ["a", "y"], "score": 1}])[0]["messages"][1] == "x"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["stage=sft", "data.packing=packed", "rollout=null", "rewards=[]"],
            "answers are sampled as in stage ppo or grpo",
        ),
        (["model.weights=null"], "model.weights: found none"),
        (["adapter={rank: 2}"], "adapter: expected null"),
    ],
)
def test_what_cannot_be_sampled_is_refused(config, tmp_path, overrides, message):
    with pytest.raises(jaxllm.InputError, match=message):
        sample_best(load_config([config], overrides), tmp_path / "best.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_only_outputs_count_as_earlier_ones(config, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"messages": []}\n')
    with pytest.raises(jaxllm.InputError, match=r"rows.jsonl:1: found no row with 'messages' and 'score'"):
        sample_best(load_config([config]), tmp_path / "best.jsonl", earlier=[tmp_path / "rows.jsonl"])
