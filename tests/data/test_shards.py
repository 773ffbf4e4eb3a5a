"""Token shards: what goes in comes out, all or nothing is written, and damage is named."""

import json
import os
import resource
import threading

import numpy as np
import pytest

from jaxllm.config.schema import SourceConfig
from jaxllm.data import shards as shards_module
from jaxllm.data.shards import ShardSet, prepare_source, tokenize_files
from jaxllm.errors import InputError
from jaxllm.files import OutputExistsError

TEXTS = ["alpha", "βeta", "a longer third text", "d", "epsilon"]


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:4])
    (folder / "a.jsonl").write_text(rows)
    (folder / "b.txt").write_text(TEXTS[4])
    return folder


@pytest.mark.parametrize("shard_tokens", [1, 12, 10**6])
def test_documents_come_back_with_their_origin(tmp_path, corpus, tokenizer, shard_tokens):
    seen = []
    index = tokenize_files(
        [corpus], tokenizer, tmp_path / "out", shard_tokens=shard_tokens, progress=lambda *counts: seen.append(counts)
    )
    shards = ShardSet.open(tmp_path / "out")
    assert shards.index == index
    assert [bytes(shards.tokens(i).tolist()).decode() for i in range(len(shards))] == TEXTS
    assert [shards.origin(i) for i in range(5)] == [f"{corpus}/a.jsonl:{n}" for n in (1, 2, 3, 4)] + [
        f"{corpus}/b.txt:1"
    ]
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert (shards.num_bytes, shards.num_tokens, len(shards)) == (num_bytes, num_bytes, 5)
    assert shards.lengths().tolist() == [len(text.encode()) for text in TEXTS]
    assert len(index.shards) == {1: 5, 12: 3, 10**6: 1}[shard_tokens]
    assert seen[-1] == (5, num_bytes) and len(seen) == 5


@pytest.mark.parametrize(("vocab_size", "dtype"), [(257, np.uint16), (2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_the_files_are_plain_npy_of_the_smallest_dtype(tmp_path, corpus, byte_tokenizer, vocab_size, dtype):
    tokenizer = byte_tokenizer(vocab_size - 257)
    tokenize_files([corpus], tokenizer, tmp_path / "out")
    tokens = np.load(tmp_path / "out" / "tokens-00000.npy", allow_pickle=False)
    assert tokens.dtype == dtype
    assert tokenizer.decode(tokens.tolist()) == "".join(TEXTS)
    documents = np.load(tmp_path / "out" / "documents-00000.npy", allow_pickle=False)
    assert documents.dtype == np.int64
    assert documents[:, 1:].tolist() == [[0, 1], [0, 2], [0, 3], [0, 4], [1, 1]]


def test_skipped_rows_are_counted(tmp_path, corpus, tokenizer):
    (corpus / "c.jsonl").write_text('{"text": "x"}\n{}\n')
    index = tokenize_files([corpus], tokenizer, tmp_path / "out", max_bad_rows=1)
    assert index.bad_rows == 1
    assert index.bad_row_examples[0].startswith(f"{corpus}/c.jsonl:2: no field 'text'")


def test_nothing_is_left_when_the_input_is_bad(tmp_path, corpus, tokenizer):
    (corpus / "c.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"c\.jsonl:1: no field 'text'"):
        tokenize_files([corpus], tokenizer, tmp_path / "out")
    with pytest.raises(InputError, match=r"no documents; 1 bad row"):
        tokenize_files([corpus / "c.jsonl"], tokenizer, tmp_path / "out", max_bad_rows=1)
    assert list(tmp_path.iterdir()) == [corpus]


def test_nothing_is_left_when_the_disk_is_full(tmp_path, corpus, tokenizer):
    (corpus / "c.txt").write_text("x" * 10**5)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(InputError, match=r"out: could not be written: File too large"):
            tokenize_files([corpus], tokenizer, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [corpus]


def test_an_output_that_holds_something_is_refused_and_kept(tmp_path, corpus, tokenizer):
    output = tmp_path / "out"
    output.mkdir()
    tokenize_files([corpus], tokenizer, output)
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    with pytest.raises(OutputExistsError, match=r"out: exists and is not empty"):
        tokenize_files([corpus / "b.txt"], tokenizer, output)
    with pytest.raises(OutputExistsError, match=r"b\.txt: found a file"):
        tokenize_files([corpus], tokenizer, corpus / "b.txt")
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


def test_an_id_outside_the_vocabulary_is_refused(tmp_path, corpus, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "vocab_size", 110)
    with pytest.raises(InputError, match=r"a\.jsonl:1: the tokenizer made the id 112, outside its vocabulary of 110"):
        tokenize_files([corpus], tokenizer, tmp_path / "out")


def edit_index(**changes):
    def edit(folder):
        index = json.loads((folder / "index.json").read_text())
        (folder / "index.json").write_text(json.dumps({**index, **changes}))

    return edit


def replace(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def truncate(name):
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size - 2)


def change_documents(row, column, value):
    def change(folder):
        rows = np.load(folder / "documents-00000.npy")
        rows[row, column] = value
        np.save(folder / "documents-00000.npy", rows)

    return change


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "index.json").unlink(), r"index\.json: cannot be read \(No such file"),
        (lambda folder: (folder / "tokens-00000.npy").unlink(), r"tokens-00000\.npy: cannot be read"),
        (truncate("index.json"), r"index\.json: not valid JSON"),
        (replace("index.json", b"[]"), r"index\.json: found format and version None"),
        (edit_index(format="other"), r"found format and version \('other', 1\), expected \('jaxllm-tokens', 1\)"),
        (edit_index(version=2), r"found format and version \('jaxllm-tokens', 2\)"),
        (edit_index(num_tokens="many"), r"index\.json: num_tokens is 'many', expected int"),
        (edit_index(num_tokens=7), r"index\.json: num_tokens is 7, but the shards' sum is 37"),
        (edit_index(shards=[{"tokens": "x"}]), r"shards\[0\]: found \['tokens'\], expected an object of the fields"),
        (edit_index(dtype="int32"), r"index\.json: dtype is 'int32', expected 'uint16' or 'uint32'"),
        (edit_index(dtype="uint32"), r"tokens-00000\.npy: found uint16 \[37\], expected uint32 \[37\]"),
        (edit_index(sources=["a"]), r"documents-00000\.npy: damaged: names source files beyond the 1"),
        (truncate("tokens-00000.npy"), r"tokens-00000\.npy: truncated or no \.npy file \(200 bytes"),
        (truncate("documents-00000.npy"), r"documents-00000\.npy: truncated or no \.npy file"),
        (replace("tokens-00000.npy", b""), r"tokens-00000\.npy: truncated or no \.npy file \(0 bytes"),
        (replace("tokens-00000.npy", b"PK\3\4" * 100), r"tokens-00000\.npy: truncated or no \.npy file"),
        (change_documents(1, 0, 2), r"documents-00000\.npy: damaged: document ends must rise to 37"),
        (change_documents(-1, 0, 99), r"documents-00000\.npy: damaged: document ends must rise to 37"),
    ],
)
def test_damaged_shards_are_refused_by_name(tmp_path, corpus, tokenizer, damage, problem):
    tokenize_files([corpus], tokenizer, tmp_path / "out")
    damage(tmp_path / "out")
    with pytest.raises(InputError, match=problem):
        ShardSet.open(tmp_path / "out")


def test_an_index_cannot_point_outside_its_folder(tmp_path, corpus, tokenizer):
    tokenize_files([corpus], tokenizer, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    index["shards"][0]["tokens"] = "../out/tokens-00000.npy"
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"'\.\./out/tokens-00000\.npy' is no plain file name"):
        ShardSet.open(tmp_path / "out")


def test_text_is_tokenised_once_and_again_when_it_changes(tmp_path, corpus, tokenizer):
    source, cache = SourceConfig(path=str(corpus)), tmp_path / "cache"
    first = prepare_source(source, tokenizer, cache)
    made = first.folder.stat().st_mtime_ns
    assert prepare_source(source, tokenizer, cache).folder.stat().st_mtime_ns == made
    assert [path.name for path in cache.iterdir()] == [first.folder.name]
    (corpus / "b.txt").write_text("changed")
    assert prepare_source(source, tokenizer, cache).tokens(4).tobytes() != first.tokens(4).tobytes()


def test_a_cached_copy_does_not_hide_bad_rows(tmp_path, corpus, tokenizer):
    (corpus / "c.jsonl").write_text('{"text": "x"}\n{}\n')
    source = SourceConfig(path=str(corpus))
    assert prepare_source(source, tokenizer, tmp_path / "cache", max_bad_rows=1).index.bad_rows == 1
    with pytest.raises(InputError, match=r"1 bad row \(max_bad_rows allows 0\)\n.*c\.jsonl:2"):
        prepare_source(source, tokenizer, tmp_path / "cache")


def test_processes_may_fill_one_cache_at_once(tmp_path, corpus, tokenizer, monkeypatch):
    both_wrote = threading.Barrier(2)
    write_index = shards_module.write_index
    monkeypatch.setattr(shards_module, "write_index", lambda *args: (write_index(*args), both_wrote.wait(10)))
    found = []

    def prepare():
        shards = prepare_source(SourceConfig(path=str(corpus)), tokenizer, tmp_path / "cache")
        found.append(bytes(shards.tokens(0).tolist()))

    threads = [threading.Thread(target=prepare) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [b"alpha", b"alpha"]
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.parametrize("format", ["auto", "shards"])
def test_shards_are_opened_in_place_if_the_tokenizer_is_theirs(tmp_path, corpus, tokenizer, byte_tokenizer, format):
    tokenize_files([corpus], tokenizer, tmp_path / "out")
    source = SourceConfig(path=str(tmp_path / "out"), format=format)
    assert prepare_source(source, tokenizer, tmp_path / "cache").folder == tmp_path / "out"
    assert not (tmp_path / "cache").exists()
    with pytest.raises(InputError, match=r"out: the shards were made with another tokenizer"):
        prepare_source(source, byte_tokenizer(1), tmp_path / "cache")
