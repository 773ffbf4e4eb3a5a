"""A small world to train in, a starter of commands, and a run that nothing disturbs."""

import json

import pytest

import jaxllm
from jaxllm.spec import spec_to_json, tiny
from jaxllm.tokenizers.train import train_bpe
from tests.train.runs import Starter, World, write_documents


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_documents(folder / "train.jsonl", 300, seed=0)
    write_documents(folder / "heldout.jsonl", 20, seed=1)
    texts = [json.loads(line)["text"] for line in (folder / "train.jsonl").read_text().splitlines()]
    train_bpe(texts, vocab_size=300).save(folder / "tokenizer")
    (folder / "spec.json").write_text(spec_to_json(tiny(jaxllm.spec("llama2-70b"), vocab_size=320)))
    return World(folder)


@pytest.fixture(scope="session")
def start():
    starter = Starter()
    yield starter
    starter.close()


@pytest.fixture(scope="session")
def undisturbed(world, start, tmp_path_factory):
    """The folder of a finished run of 24 steps, which others are compared with and copied from."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    command = start(f"{run}.out", "train", "--config", world.write_config(run))
    assert command.wait() == 0, command.text
    return run
