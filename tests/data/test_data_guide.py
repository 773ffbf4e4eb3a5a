"""The Python of docs/data.md runs as it stands."""

import re
from pathlib import Path

from jaxllm.data.shards import tokenize_files

GUIDE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_examples_run(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    monkeypatch.chdir(tmp_path)
    tokenize_files(["a.jsonl"], tokenizer, "shards/corpus")
    names = {}
    for example in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(example, names)
    assert bytes(names["second_document"].tolist()) == b"two"
    assert names["where"] == "a.jsonl:3"
