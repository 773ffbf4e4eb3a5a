"""`jaxllm data reasoning-gym` and `jaxllm data ghost-attention` as a user runs them, with good input and bad."""

import dataclasses
import json
import os
import re
import signal
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.cli import main
from jaxllm.data.rows import read_row
from jaxllm.nn.model import abstract_params
from jaxllm.train.rollouts import ghost_dialogues
from jaxllm.train.rollouts.ghost_dialogues import GhostOptions, write_ghost_rows
from tests.data.chats import chat_tokenizer, talk, write_rows
from tests.saved_runs import save_run
from tests.tiny_models import LLAMA

LETTERS = "abcdefgh"
CONSTRAINTS = [{"name": "hobby", "instruction": "You enjoy {}.", "short": "Hobby: {}", "values": ["chess", "go"]}]
DIALOGUES = [
    {"messages": talk("Hi", "Hello", "How are you?", "Well")},
    {"conversations": [{"from": "human", "value": "One"}, {"from": "gpt", "value": "old"}]},
    {"messages": talk("a", "b", "c", "d", "e", "f")},
    {"messages": [{"role": "system", "content": "Be kind"}, *talk("Hm", "old")]},
]
GHOST = ("data", "ghost-attention", "--model", "run", "--dialogues", "mixed/", "--constraints", "kinds.json")


@pytest.fixture(scope="module")
def tokenizer():
    return chat_tokenizer("chatml")


def scribbling_params(spec, tokenizer, end):
    """Return parameters of a model that draws letters whatever was said, and ends a reply with the logit `end`."""
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), abstract_params(spec))
    params["embedding"] += 1
    params["final_norm"]["scale"] += 1
    logits = np.full(spec.vocab_size, -30.0)
    logits[[ord(letter) for letter in LETTERS]] = 0
    logits[tokenizer.special_tokens["<|im_end|>"]] = end
    params["head"] = np.tile(logits / spec.hidden_size, (spec.hidden_size, 1)).astype(np.float32)
    return jax.tree.map(jnp.asarray, params)


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch, tokenizer):
    monkeypatch.chdir(tmp_path)
    spec = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size, num_layers=1, max_position_embeddings=512)
    save_run("run", spec, scribbling_params(spec, tokenizer, end=-1.0), tokenizer=tokenizer)
    os.mkdir("mixed")
    write_rows(Path("mixed/a.jsonl"), [DIALOGUES[0], *DIALOGUES[2:]])
    write_rows(Path("mixed/b.jsonl"), DIALOGUES[1:2])
    Path("kinds.json").write_text(json.dumps(CONSTRAINTS))


def fails(capsys, *arguments):
    """Run a command that must be refused; return its one line."""
    before = sorted(os.listdir())
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err.count("\n")) == ("", 1)
    assert sorted(os.listdir()) == before
    return captured.err.removeprefix("jaxllm: error: ").rstrip("\n")


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def write(output, **options):
    """Write rows of all conversations with the model in the run."""
    call = {name: options.pop(name) for name in ("batch_size", "progress") if name in options}
    return write_ghost_rows(
        "run", ["mixed"], "kinds.json", Path(output), GhostOptions(max_new_tokens=128, **options), **call
    )


def test_ghost_attention_writes_rows_to_train_on(capsys):
    assert main([*GHOST, "--output", "new/ghost.jsonl", "--max-new-tokens", "128"]) == 0
    assert capsys.readouterr().out == "new/ghost.jsonl: 4 conversations; 0 left out for want of an ended reply\n"
    assert os.listdir("new") == ["ghost.jsonl"]
    rows = rows_of("new/ghost.jsonl")
    assert [row["origin"] for row in rows] == [
        f"mixed/{place}" for place in ("a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.jsonl:1")
    ]
    for row, source in zip(rows, (DIALOGUES[0], DIALOGUES[2], DIALOGUES[3]), strict=False):
        found, given = row["messages"], source["messages"]
        first = next(k for k, message in enumerate(found) if message["role"] == "user")
        assert re.fullmatch(
            r"(You enjoy (chess|go)\.|Hobby: (chess|go))\n" + given[first]["content"], found[first]["content"]
        )
        assert [m["content"] for m in found[first + 2 :: 2]] == [m["content"] for m in given[first + 2 :: 2]]
        replies = found[first + 1 :: 2]
        assert all(set(reply["content"]) <= set(LETTERS) for reply in replies)
        assert [reply.get("weight") for reply in replies] == [0] * (len(replies) - 1) + [None]
        read_row(row, "messages")


def test_replies_depend_on_the_seed_and_their_place_alone():
    for name, options in {"one": {}, "two": dict(batch_size=1), "other": dict(seed=1)}.items():
        write(f"{name}.jsonl", **options)
    one, two, other = (rows_of(f"{name}.jsonl") for name in ("one", "two", "other"))
    assert one == two != other
    replies = [message["content"] for row in one for message in row["messages"] if message["role"] == "assistant"]
    assert len(set(replies)) > len(replies) / 2


def test_a_signal_keeps_what_is_done_and_the_same_call_goes_on():
    write("whole.jsonl")

    def interrupt(done, of):
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    assert write("ghost.jsonl", batch_size=1, progress=interrupt).stopped
    assert not Path("ghost.jsonl").exists()
    kept = Path("ghost.jsonl.partial").read_text()
    with pytest.raises(ValueError, match="begun with another configuration"):
        write("ghost.jsonl", seed=1)
    assert Path("ghost.jsonl.partial").read_text() == kept
    done = []
    assert write("ghost.jsonl", batch_size=1, progress=lambda *counts: done.append(counts)).rows == 4
    assert done == [(3, 4), (4, 4)]
    assert Path("ghost.jsonl").read_text() == Path("whole.jsonl").read_text()
    assert not Path("ghost.jsonl.partial").exists()


def test_conversations_with_an_endless_or_empty_reply_are_left_out(tokenizer):
    spec = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size, num_layers=1, max_position_embeddings=512)
    for name, end in {"endless": -30.0, "silent": 30.0}.items():
        save_run(name, spec, scribbling_params(spec, tokenizer, end=end), tokenizer=tokenizer)
        options = GhostOptions(max_new_tokens=4, temperature=0)
        written = write_ghost_rows(name, ["mixed"], "kinds.json", Path(f"{name}.jsonl"), options)
        assert written == ghost_dialogues.Written(0, 4) and rows_of(f"{name}.jsonl") == []


def test_bad_input_of_ghost_attention(capsys, tokenizer):
    ghost = [*GHOST, "--output", "ghost.jsonl"]

    def changed(**options):
        """Return the arguments with other values."""
        return [options.get((ghost[k - 1]).strip("-"), word) for k, word in enumerate(ghost)]

    Path("taken.jsonl").write_text("")
    assert fails(capsys, *changed(output="taken.jsonl")) == "taken.jsonl: exists already; expected a new file"
    assert fails(capsys, *changed(model="none")).startswith("none: not there; expected a run, a checkpoint,")
    assert fails(capsys, *changed(dialogues="none.jsonl")) == "none.jsonl: no such file or folder"
    assert "none.json: cannot be read" in fails(capsys, *changed(constraints="none.json"))
    write_rows(Path("texts.jsonl"), [{"text": "once"}])
    assert fails(capsys, *changed(dialogues="texts.jsonl")) == "texts.jsonl:1: found a text, expected conversations"
    write_rows(Path("long.jsonl"), [{"messages": talk("x" * 500, "y")}])
    assert fails(capsys, *changed(dialogues="long.jsonl"), "--max-new-tokens", 64) == (
        "long.jsonl:1: no room for the first question and its reply among the model's positions"
    )
    assert "expected one of" in fails(capsys, *ghost, "--chat-format", "none", "--max-new-tokens", 64)
    assert fails(capsys, *ghost).startswith("--max-new-tokens: found 512, but the model has 512 positions")
    spec = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size, num_layers=1)
    model = scribbling_params(spec, tokenizer, 0.0)
    del model["head"]
    params = {"model": model, "score": {"kernel": jnp.zeros(spec.hidden_size)}}
    save_run("rm", spec, params, stage="reward", tokenizer=tokenizer)
    assert "expected a language model" in fails(capsys, *changed(model="rm"))


class Sums:
    """Stands for reasoning_gym, which the extra [rl] installs, with one of its datasets."""

    factory = types.SimpleNamespace(DATASETS={"chain_sum": None})

    @staticmethod
    def create_dataset(name, *, size, seed, max_terms=2):
        if max_terms < 2:
            raise ValueError("max_terms must be at least 2")
        numbers = np.random.default_rng(seed).integers(0, 9, (size, max_terms)).tolist()
        return [{"question": " + ".join(map(str, row)) + " = ?", "answer": str(sum(row))} for row in numbers]

    @staticmethod
    def get_score_answer_fn(name):
        return lambda answer, entry: float(answer == entry["answer"])


@pytest.fixture
def _gym(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", Sums)


@pytest.mark.usefixtures("_gym")
def test_gym_tasks_are_written(capsys):
    gym = ["data", "reasoning-gym", "chain_sum"]
    assert main([*gym, "new/sums.jsonl", "--size", "3", "--seed", "2", "--option", "max_terms=4"]) == 0
    assert capsys.readouterr().out == "new/sums.jsonl: 3 prompts of chain_sum\n"
    rows = rows_of("new/sums.jsonl")
    assert len(rows) == 3 and all(row["prompt"].count("+") == 3 for row in rows)
    assert read_row(rows[0], "prompt").reference == rows[0]["entry"]["answer"]
    assert os.listdir("new") == ["sums.jsonl"]
    assert fails(capsys, *gym, "new/sums.jsonl") == "new/sums.jsonl: exists already; expected a new file"
    assert fails(capsys, *gym, "kinds.json/x.jsonl").startswith("kinds.json/x.jsonl: could not be written: ")
    bad = {"max_terms": "expected KEY=VALUE, found 'max_terms'", "max_terms=[": "no YAML", "max_terms=1": "at least 2"}
    for option, message in bad.items():
        assert message in fails(capsys, *gym, "b/c.jsonl", "--option", option)
    assert "no dataset 'sums'; it has chain_sum" in fails(capsys, "data", "reasoning-gym", "sums", "b.jsonl")


def test_gym_tasks_need_their_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert "pip install 'jaxllm[rl]'" in fails(capsys, "data", "reasoning-gym", "chain_sum", "a.jsonl")
