"""`jaxllm tokenizer`: what its verbs print, write and refuse."""

import base64
import dataclasses
import json

import pytest

from jaxllm.checkpoint.hf import save_checkpoint
from jaxllm.cli import main
from jaxllm.tokenizers import load_tokenizer
from jaxllm.tokenizers.train import train_bpe
from tests.tiny_models import LLAMA, random_params

ROWS = [{"lang": "en", "text": "the cat sat on the mat in 1999"}, {"lang": "zh", "text": "猫坐在垫子上"}]


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3))


def run(capsys, *arguments):
    assert main(["tokenizer", *arguments]) == 0
    return capsys.readouterr().out


def fails(capsys, *arguments):
    """Run a command that must be refused; return its message."""
    assert main(["tokenizer", *arguments]) == 2
    captured = capsys.readouterr()
    return captured.err.removeprefix("jaxllm: error: ").removesuffix("\n")


def test_train_then_extend_then_export_then_compare(capsys, tmp_path):
    told = run(capsys, "train", "--input", "rows.jsonl", "--vocab-size", "270", "--output", "small")
    assert told.startswith("small: 270 tokens from 6 documents, ")
    extend = ["extend", "small", "--input", "rows.jsonl", "--vocab-size", "281", "--special-token", "<|tool|>"]
    told = run(capsys, *extend, "--output", "large", "--num-workers", "1")
    assert told.startswith("large: 281 tokens from 6 documents, ")
    small, large = load_tokenizer("small"), load_tokenizer("large")
    assert large.tokens[:262] == small.tokens and large.special_tokens["<|tool|>"] == 280

    assert run(capsys, "export", "large", "hf") == "hf/tokenizer.json\nhf/tokenizer_config.json\n"
    assert "is there already" in fails(capsys, "export", "large", "hf")
    compare = ["compare", "--tokenizer", "small", "--tokenizer", "large", "--input", "rows.jsonl", "--by", "lang"]
    lines = run(capsys, *compare).splitlines()
    assert lines[:2] == ["[1] small: 270 tokens", "[2] large: 281 tokens"]
    table = {cells[0]: cells[1:] for cells in map(str.split, lines[3:])}
    assert list(table) == ["en", "zh", "all"]
    chinese = ROWS[1]["text"]
    expected = [len(chinese.encode()) / len(tokenizer.encode(chinese)) for tokenizer in (small, large)]
    assert table["zh"][:3] == ["54", *(f"{ratio:.3f}" for ratio in expected)]
    assert len({len(line) for line in lines[2:]}) == 1


def test_extend_drops_tokens_of_several_digits(capsys, tmp_path):
    tokens = [*(bytes([byte]) for byte in range(256)), b"19", b"th", b"1999"]
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (tmp_path / "base.tiktoken").write_text(lines)
    extend = ["extend", "base.tiktoken", "--drop-multi-digit", "--input", "rows.jsonl"]
    told = run(capsys, *extend, "--vocab-size", "270", "--output", "new")
    assert told.startswith("base.tiktoken: 2 of 259 tokens have several digits and are dropped\nnew: 270 tokens")
    assert load_tokenizer("new").tokens[:257] == (*tokens[:256], b"th")


def test_slim_drops_a_range_or_what_a_text_does_not_use(capsys, tmp_path):
    spec = dataclasses.replace(LLAMA, vocab_size=288)
    tokenizer = train_bpe([row["text"] for row in ROWS] * 3, vocab_size=280)
    save_checkpoint(tmp_path / "model", spec, random_params(spec), tokenizer=tokenizer)
    told = run(capsys, "slim", "model", "--drop", "280:288", "--output", "cut")
    assert told.startswith("cut: 280 of 288 ids\n")
    (tmp_path / "mine.txt").write_text("the cat")
    told = run(capsys, "slim", "model", "--unused", "mine.txt", "--output", "mine")
    slim = load_tokenizer("mine")
    assert told.startswith(f"mine: {slim.vocab_size} of 288 ids\n") and slim.vocab_size < 280
    assert slim.decode(slim.encode("the cat")) == "the cat"
    assert len(slim.encode("the cat")) == len(tokenizer.encode("the cat"))
    assert "not empty" in fails(capsys, "slim", "model", "--drop", "280:288", "--output", "cut")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["slim", "m", "--output", "o"], "one of the arguments --drop --unused is required"),
        (["slim", "m", "--output", "o", "--drop", "5:5"], "expected FIRST:END with FIRST below END, found '5:5'"),
        (["slim", "m", "--output", "o", "--drop", "5"], "expected FIRST:END"),
        (["slim", "nowhere", "--output", "o", "--drop", "0:5"], "no config.json"),
        (["train", "--input", "rows.jsonl", "--vocab-size", "9", "--output", "o"], "expected at least 264"),
        (["train", "--input", "rows.jsonl", "--vocab-size", "9", "--output", "o", "--num-workers", "0"], "at least 1"),
        (["extend", "nowhere", "--input", "rows.jsonl", "--vocab-size", "9", "--output", "o"], "nowhere"),
        (["export", "nowhere", "o"], "nowhere: no such file"),
        (["compare", "--input", "rows.jsonl"], "--tokenizer"),
        (["trian"], "did you mean 'train'?"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, tmp_path, arguments, message):
    found = fails(capsys, *arguments)
    assert message in found and "\n" not in found
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
