"""Training a tokenizer on files, as the command line does."""

import gzip
import json

import pytest

from jaxllm.data.train_tokenizer import train_from_files
from jaxllm.errors import InputError
from jaxllm.tokenizers import load_tokenizer

TEXTS = ["the cat sat on the mat, the cat sat", "猫坐在垫子上，猫坐在垫子上", "the dog sat on the log"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"body": text}) + "\n" for text in TEXTS).encode()))
    return path


def test_the_folder_holds_a_tokenizer_of_that_size_and_the_summary_describes_the_text(tmp_path, file):
    (tmp_path / "more.txt").write_text("the cat")
    summary = train_from_files([file, tmp_path / "more.txt"], vocab_size=280, output=tmp_path / "tok", text_key="body")
    tokenizer = load_tokenizer(tmp_path / "tok")
    assert tokenizer.vocab_size == 280
    texts = [*TEXTS, "the cat"]
    num_bytes = sum(len(text.encode()) for text in texts)
    assert (summary.num_documents, summary.num_bytes) == (4, num_bytes)
    assert summary.bytes_per_token == num_bytes / sum(len(tokenizer.encode(text)) for text in texts)
    assert summary.seconds > 0


def test_an_output_that_holds_something_is_refused_and_left_alone(tmp_path, file):
    used = tmp_path / "used"
    used.mkdir()
    (used / "notes").write_text("mine")
    for output, message in ((used, "not empty"), (used / "notes", "found a file")):
        with pytest.raises(InputError, match=message):
            train_from_files([file], vocab_size=280, output=output, text_key="body")
    assert (used / "notes").read_text() == "mine"


@pytest.mark.parametrize(
    ("vocab_size", "text_key", "message"),
    [(280, "text", "rows.jsonl.gz:1"), (100_000, "body", "vocab_size: found 100000, expected at most")],
)
def test_bad_input_writes_nothing(tmp_path, file, vocab_size, text_key, message):
    with pytest.raises(InputError, match=message):
        train_from_files([file], vocab_size=vocab_size, output=tmp_path / "tok", text_key=text_key)
    assert not (tmp_path / "tok").exists()
