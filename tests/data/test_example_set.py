"""Example sets: made once, all of them or nothing, and refused with the place of what is wrong."""

import dataclasses
import gzip
import json

import numpy as np
import pytest

from jaxllm.config.schema import SourceConfig
from jaxllm.data.example_set import ExampleSet, prepare_examples
from jaxllm.errors import InputError
from tests.data.chats import WEATHER, make_encoder, make_set, talk, tool_talk, write_rows

ROW = {"messages": talk("q", "a")}
BAD = {"messages": talk("q", "")}
LONG = {"messages": talk("q", "a" * 200)}


def prepared(path, purpose="sft", *, encoder=None, rows="auto", **options):
    source = SourceConfig(path=str(path), rows=rows)
    options = {"seq_len": 100} | options
    return prepare_examples(source, purpose, encoder or make_encoder(), path.parent / "cache", **options)


def cached(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


def write_parquet(path, rows):
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(rows), path)


def test_a_set_is_made_once_and_again_when_anything_changes(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [ROW])
    counts = []
    prepared(path, progress=lambda *done: counts.append(done))
    prepared(path, progress=lambda *done: counts.append(done))
    assert [examples for examples, _ in counts] == [1]
    prepared(path, encoder=make_encoder(turns="last"))
    prepared(path, encoder=make_encoder("chatml-qwen"))
    prepared(path, encoder=make_encoder("chatml-qwen", labels="published"))
    prepared(path, seq_len=101)
    prepared(path, too_long="skip")
    write_rows(path, [ROW, ROW])
    assert len(prepared(path)) == 2
    assert len(cached(tmp_path)) == 7


def test_a_scratch_folder_takes_what_the_cache_lacks(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [ROW])
    assert prepared(path, scratch=tmp_path / "scratch").folder.parent == tmp_path / "scratch"
    prepared(path)
    assert prepared(path, scratch=tmp_path / "other").folder.parent == tmp_path / "cache"


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_files_of_all_formats_give_the_same_examples(tmp_path, kind):
    rows = [
        ROW,
        {"messages": talk("q1", "a1", "q2", "a2"), "tools": None},
        {"messages": tool_talk()[:1] + talk("", "b")[1:]},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path = tmp_path / f"a.{kind}"
    if kind == "parquet":
        write_parquet(path, rows)
    elif kind == "jsonl.zst":
        path.write_bytes(pytest.importorskip("zstandard").compress(text))
    else:
        path.write_bytes(gzip.compress(text) if kind == "jsonl.gz" else text)
    found, expected = prepared(path), make_set(tmp_path, rows)
    assert [found.tokens(k)[0].ids.tolist() for k in range(3)] == [expected.tokens(k)[0].ids.tolist() for k in range(3)]
    assert [found.origin(k) for k in range(3)] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_bad_rows_are_refused_beyond_the_budget_and_nothing_is_left(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [ROW, BAD, ROW, BAD])
    with pytest.raises(
        InputError, match=r"^1 bad row \(max_bad_rows allows 0\)\n  .*a\.jsonl:2: messages\[1\]: the ass"
    ):
        prepared(path)
    assert cached(tmp_path) == []
    examples = prepared(path, max_bad_rows=2)
    assert len(examples) == 2 and examples.index.bad_rows == 2
    assert examples.summary().endswith("trained), 2 bad rows skipped")
    assert [examples.origin(k) for k in range(2)] == [f"{path}:1", f"{path}:3"]
    # The copy of a run that allowed more does not help one that allows less.
    with pytest.raises(InputError, match=r"2 bad rows \(max_bad_rows allows 1\)"):
        prepared(path, max_bad_rows=1)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": [{"role": "bot", "content": "x"}]},
            "messages[0]: role: found 'bot', expected one of system, user",
        ),
        ({"messages": talk("", "a")[1:]}, "chat format chatml: messages[0]: found the assistant's after none"),
        ({"messages": talk("q")}, "messages: found no message of the assistant to train on"),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b"},
            "found a preference row, expected a messages row as before it",
        ),
        ({"messages": tool_talk(), "tools": [WEATHER]}, "chat format chatml: messages[1].tool_calls[0]: found a tool"),
        (
            {"messages": [*talk("q"), talk("", "a")[1] | {"weight": 3}]},
            "chat format chatml: messages[1]: weight: found 3, expected 0",
        ),
        ({"messages": talk("q", "\ud800")}, "text is not valid Unicode: lone surrogate U+D800"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, row, problem):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (ROW, row)))
    with pytest.raises(InputError) as error:
        prepared(path)
    assert f"a.jsonl:2: {problem}" in str(error.value)


@pytest.mark.parametrize("arguments", ["not JSON", [1], None])
def test_malformed_calls_are_refused(tmp_path, arguments):
    messages = tool_talk()
    messages[1]["tool_calls"][0]["function"]["arguments"] = arguments
    path = write_rows(tmp_path / "a.jsonl", [{"messages": messages, "tools": [WEATHER]}])
    with pytest.raises(InputError, match=r"a\.jsonl:1: .*arguments: found .*, expected a JSON object"):
        prepared(path, encoder=make_encoder("glm4"))


def test_a_file_for_something_else_is_refused_whatever_the_budget(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match=r"a\.jsonl:1: found a preference row; stage sft takes messages or sharegpt"):
        prepared(path, max_bad_rows=9)
    with pytest.raises(InputError, match=r"a\.jsonl: found a messages row; stage reward or dpo takes preference rows"):
        prepared(path, "preference", rows="messages")
    path = write_rows(tmp_path / "b.jsonl", [{"question": "q"}])
    with pytest.raises(InputError, match=r"b\.jsonl:1: cannot tell what the row is: found the fields 'question'"):
        prepared(path)


def test_a_named_kind_needs_its_fields(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [ROW])
    with pytest.raises(InputError, match=r"a\.jsonl:1: output: found null, expected a string|instruction"):
        prepared(path, rows="alpaca")


def test_rows_that_are_too_long_are_bad_left_out_or_cut(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [ROW, LONG])
    with pytest.raises(InputError, match=r"a\.jsonl:2: found \d+ tokens, expected at most 100; data\.seq_len gives"):
        prepared(path)
    skipped = prepared(path, too_long="skip")
    assert (len(skipped), skipped.index.left_out, skipped.index.cut) == (1, 1, 0)
    assert skipped.summary().endswith("1 too long and left out")
    cut = prepared(path, too_long="truncate")
    assert (len(cut), cut.index.left_out, cut.index.cut, cut.lengths().max()) == (2, 0, 1, 100)


@pytest.mark.parametrize("purpose", ["preference", "prompt"])
def test_prompts_are_never_cut(tmp_path, purpose):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q" * 200, "chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match=f"data.too_long: found 'truncate', .*no part of a {purpose} row can be cut"):
        prepared(path, purpose, too_long="truncate")


def test_rows_need_room(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "q"}])
    with pytest.raises(InputError, match=r"data\.seq_len: leaves -3 tokens for each of the prompt rows"):
        prepared(path, "prompt", seq_len=-3)


def test_no_examples_at_all_are_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [LONG])
    with pytest.raises(InputError, match="no examples; 1 too long; 0 bad rows"):
        prepared(path, too_long="skip")


def test_a_tokenizer_without_the_formats_tokens_is_refused_before_reading(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [ROW])
    encoder = dataclasses.replace(make_encoder(), chat=make_encoder("glm4").chat)
    with pytest.raises(InputError, match=r"^chat format glm4: the tokenizer has no special token"):
        prepared(path, encoder=encoder, max_bad_rows=9)


def test_txt_files_and_texts_are_trained_whole(tmp_path):
    (tmp_path / "a.txt").write_text("some text")
    encoder = make_encoder()
    (tokens,) = prepared(tmp_path / "a.txt").tokens(0)
    assert encoder.tokenizer.decode(tokens.labels[1:].tolist()) == "some text<|endoftext|>"


def test_damaged_sets_are_refused(tmp_path):
    folder = make_set(tmp_path, [ROW, LONG]).folder
    ids = np.load(folder / "examples.npy")
    np.save(folder / "examples.npy", ids[:1])
    with pytest.raises(InputError, match=r"examples\.npy: found int64 \[1, 4\], expected int64 \[2, 4\]"):
        ExampleSet.open(folder)
    np.save(folder / "examples.npy", ids[::-1])
    with pytest.raises(InputError, match=r"examples\.npy: damaged: column 0 must rise to"):
        ExampleSet.open(folder)
    (folder / "index.json").write_text('{"format": "other"}')
    with pytest.raises(InputError, match="found format and version"):
        ExampleSet.open(folder)


def test_rows_that_json_cannot_hold_are_no_prompts(tmp_path):
    write_parquet(tmp_path / "a.parquet", [{"prompt": "q", "reference": b"\x00"}])
    with pytest.raises(InputError, match=r"a\.parquet:1: the row cannot be kept as JSON"):
        prepared(tmp_path / "a.parquet", "prompt")
