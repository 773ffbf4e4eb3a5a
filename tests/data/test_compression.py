"""Comparing tokenizers: the counts are those of the texts, grouped by file or by a field."""

import json

import pytest

from jaxllm.data.compression import compare_tokenizers, total_of
from jaxllm.data.used_ids import used_ids
from jaxllm.errors import InputError
from jaxllm.tokenizers.train import train_bpe

ROWS = [
    {"lang": "en", "text": "the cat sat on the mat"},
    {"lang": "zh", "text": "猫坐在垫子上"},
    {"lang": "en", "text": "the cat"},
]


@pytest.fixture(scope="module")
def tokenizers():
    texts = [row["text"] for row in ROWS] * 3
    return [train_bpe(texts, vocab_size=vocab_size) for vocab_size in (264, 280)]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "b.txt").write_text("e\u0301t\u00e9")
    return tmp_path


def test_each_file_is_a_group(folder, tokenizers):
    groups = compare_tokenizers(tokenizers, [folder])
    assert list(groups) == [str(folder / "a.jsonl"), str(folder / "b.txt")]
    accents = groups[str(folder / "b.txt")]
    assert (accents.num_bytes, accents.num_characters) == (6, 4)
    assert accents.num_tokens[0] == 5
    assert accents.bytes_per_token()[0] == 6 / 5 and accents.tokens_per_character()[0] == 5 / 4


def test_a_field_names_the_group(folder, tokenizers):
    calls = []
    progress = lambda *counts: calls.append(counts)  # noqa: E731
    groups = compare_tokenizers(tokenizers, [folder / "a.jsonl"], group_key="lang", progress=progress)
    assert list(groups) == ["en", "zh"]
    english = [row["text"] for row in ROWS if row["lang"] == "en"]
    assert groups["en"].num_characters == sum(map(len, english))
    assert groups["en"].num_tokens == [sum(len(t.encode(text)) for text in english) for t in tokenizers]
    total = total_of(list(groups.values()))
    assert total.num_bytes == sum(len(row["text"].encode()) for row in ROWS)
    assert calls == [(1, 22), (2, 40), (3, 47)]
    assert total.num_tokens[0] > total.num_tokens[1] > 0


def test_a_text_file_is_a_group_whatever_the_field(folder, tokenizers):
    groups = compare_tokenizers(tokenizers, [folder], group_key="lang")
    assert list(groups) == ["en", "zh", str(folder / "b.txt")]


def test_a_row_without_the_field_is_refused(folder, tokenizers):
    (folder / "a.jsonl").write_text('{"text": "x", "lang": "en"}\n{"text": "y"}\n')
    with pytest.raises(InputError, match=r"a\.jsonl:2: no field 'lang'"):
        compare_tokenizers(tokenizers, [folder], group_key="lang")


def test_used_ids_are_those_of_the_texts(folder, tokenizers):
    calls = []
    found = used_ids(tokenizers[1], [folder / "a.jsonl"], progress=lambda *counts: calls.append(counts))
    assert found == sorted({token_id for row in ROWS for token_id in tokenizers[1].encode(row["text"])})
    assert calls[-1] == (3, len(found))
