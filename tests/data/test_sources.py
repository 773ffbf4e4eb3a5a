"""What is read from each format, and the message each kind of bad input gives."""

import gzip
import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jaxllm.data.sources import BadRows, find_files, read_documents
from jaxllm.errors import InputError

ROWS = ["first", "第二", "three\nlines\n"]


def read(path, budget=0, **options):
    bad_rows = BadRows(budget)
    return list(read_documents(path, bad_rows=bad_rows, **options)), bad_rows


def jsonl(rows):
    return b"".join(json.dumps({"id": 1, "text": row}).encode() + b"\n" for row in rows)


def write_parquet(path, column, name="text"):
    pq.write_table(pa.table({"id": list(range(len(column))), name: column}), path, row_group_size=2)


def zstd_frames(data):
    """Two frames, as `cat a.zst b.zst` gives."""
    half = len(data) // 2
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


@pytest.mark.parametrize(
    ("name", "encode"),
    [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstd_frames), ("A.JSONL", bytes)],
)
def test_jsonl_gives_one_document_a_row(tmp_path, name, encode):
    file = tmp_path / name
    file.write_bytes(encode(jsonl(ROWS)))
    documents, bad_rows = read(file)
    assert documents == [(text, str(file), line) for line, text in enumerate(ROWS, 1)]
    assert bad_rows.count == 0


def test_lines_survive_the_borders_of_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxllm.data.file_chunks._CHUNK_BYTES", 7)
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(ROWS).rstrip(b"\n"))
    assert [document.text for document in read(file)[0]] == ROWS


def test_parquet_gives_one_document_a_row_with_its_number(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, ROWS, name="body")
    documents, _ = read(file, text_key="body")
    assert documents == [(text, str(file), row) for row, text in enumerate(ROWS, 1)]


def test_txt_gives_one_document_a_file(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one\ntwo\n", encoding="utf-8")
    assert read(file)[0] == [("one\ntwo\n", str(file), 1)]


def test_a_byte_order_mark_is_no_text_and_blank_lines_are_no_rows(tmp_path):
    (tmp_path / "a.txt").write_text("one", encoding="utf-8-sig")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\r\n\r\n{"text": "three"}\r\n \n')
    documents, _ = read(tmp_path)
    assert [(document.text, document.line) for document in documents] == [("one", 1), ("two", 1), ("three", 3)]


def test_folders_and_globs_are_read_in_sorted_order(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.txt", ".hidden/d.txt", ".e.txt", "README.md"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(jsonl(["x"]))
    assert [file.name for file, _ in find_files(tmp_path)] == ["a.jsonl", "b.txt", "c.txt"]
    assert [file.name for file, _ in find_files(tmp_path, "txt")] == ["b.txt", "c.txt"]
    assert [(file.name, kind) for file, kind in find_files(tmp_path / "*.*l")] == [("a.jsonl", "jsonl")]
    assert find_files(tmp_path / "README.md", "jsonl") == [(tmp_path / "README.md", "jsonl")]


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b'{"text": "cut', r":2: invalid JSON: Unterminated string starting at: column 10"),
        (b"[" * 100_000, r":2: unreadable JSON"),
        (b'{"text": "\xff"}', r":2: found byte 0xff at byte 11 of the line, expected UTF-8"),
        (b'["text"]', r":2: found a list, expected a JSON object"),
        (b'{"txt": "x", "id": 3}', r":2: no field 'text'; found 'txt', 'id' \(did you mean 'txt'\?\)"),
        (b"{}", r":2: no field 'text'; found none"),
        (b'{"text": null}', r":2: 'text' is null, expected a string"),
        (b'{"text": 3}', r":2: 'text' is a number, expected a string"),
        (b'{"text": ["a"]}', r":2: 'text' is a list, expected a string"),
        (b'{"text": ""}', r":2: 'text' is empty"),
        (b'{"text": " \\n"}', r":2: 'text' is blank"),
        (b'{"text": "\\ud800"}', r":2: 'text' holds half of a surrogate pair \(\\ud800\)"),
    ],
)
def test_a_bad_row_is_refused_or_skipped_within_the_budget(tmp_path, row, problem):
    file = tmp_path / "a.jsonl"
    file.write_bytes(jsonl(["good"]) + row + b"\n" + jsonl(["fine"]))
    with pytest.raises(InputError, match=r"1 bad row \(max_bad_rows allows 0\)\n.*a\.jsonl" + problem):
        read(file)
    documents, bad_rows = read(file, budget=1)
    assert [(document.text, document.line) for document in documents] == [("good", 1), ("fine", 3)]
    assert bad_rows.count == 1


def test_parquet_rows_without_text_are_bad_rows(tmp_path):
    file = tmp_path / "a.parquet"
    broken = pa.array([b"ok", None, b"\xff"], pa.binary()).view(pa.string())
    write_parquet(file, broken)
    documents, bad_rows = read(file, budget=2)
    assert [document.text for document in documents] == ["ok"]
    assert bad_rows.examples == [
        f"{file}:2: 'text' is null, expected a string",
        f"{file}:3: 'text' is bytes that are not UTF-8, expected a string",
    ]


def test_over_the_budget_the_first_three_and_the_total_are_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 3)
    (tmp_path / "b.jsonl").write_bytes(jsonl(["good"]) + b"{}\n" * 3)
    with pytest.raises(InputError, match=r"(?s)^5 bad rows \(max_bad_rows allows 4\).*:1:.*:2:.*:3:.*\n  \.\.\.$"):
        read(tmp_path / "*.jsonl", budget=4)


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.txt", b" \n", r"a\.txt: the file holds nothing but blanks"),
        ("a.txt", b"one\ntw\xc3o", r"a\.txt:2: found byte 0xc3, expected UTF-8"),
        ("a.txt", "one".encode("utf-16"), r"a\.txt:1: found byte 0xff, expected UTF-8"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: the file holds no rows"),
        ("a.jsonl.gz", gzip.compress(jsonl(ROWS), mtime=0)[:-9], r"a\.jsonl\.gz: .*truncated"),
        ("a.jsonl.gz", jsonl(ROWS), r"a\.jsonl\.gz: not gzip data"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), r"a\.jsonl\.gz: the file holds no rows"),
        ("a.jsonl.zst", zstandard.compress(jsonl(ROWS))[:-4], r"a\.jsonl\.zst: .*truncated"),
        ("a.jsonl.zst", jsonl(ROWS), r"a\.jsonl\.zst: not zstd data"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: cannot be read as parquet"),
        ("a.parquet", b"", r"a\.parquet: the file is empty"),
        ("a.csv", b"text\nx\n", r"a\.csv: cannot tell the format"),
    ],
)
def test_a_bad_file_is_refused_whatever_the_budget(tmp_path, name, content, problem):
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputError, match=problem):
        read(file, budget=100)


def test_bad_parquet_files_are_refused(tmp_path):
    file = tmp_path / "a.parquet"
    write_parquet(file, ["x"] * 1000)
    whole = file.read_bytes()
    for cut in (10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with pytest.raises(InputError, match=r"a\.parquet: cannot be read as parquet"):
            read(file)
    write_parquet(file, [1, 2])
    with pytest.raises(InputError, match=r"column 'text' is of type int64, expected string"):
        read(file)
    with pytest.raises(InputError, match=r"no column 'texts'; found 'id', 'text' \(did you mean 'text'\?\)"):
        read(file, text_key="texts")


def test_what_is_not_there_is_refused(tmp_path):
    (tmp_path / "a.md").touch()
    for path, problem in [
        ("b.jsonl", r"b\.jsonl: no such file or folder"),
        ("*.jsonl", r"\*\.jsonl: the pattern matches no file"),
        ("", r"the folder holds no file that ends in \.txt or \.jsonl or"),
    ]:
        with pytest.raises(InputError, match=problem):
            read(tmp_path / path)


@pytest.mark.parametrize(("name", "package"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=rf"{name} needs the package '{package}'.*jaxllm\[data\]"):
        read(tmp_path / name)
