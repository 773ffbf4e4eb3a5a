"""The Python of docs/post_training_data.md runs as it stands, and its table has all kinds of rows."""

import re
from pathlib import Path

from jaxllm.data.rows import PURPOSE_KINDS, STAGE_PURPOSES
from tests.data.chats import chat_tokenizer

GUIDE = Path(__file__).parents[2] / "docs" / "post_training_data.md"


def test_the_examples_run(tmp_path, monkeypatch):
    chat_tokenizer("chatml").save(tmp_path / "TOKENIZER")
    monkeypatch.chdir(tmp_path)
    names = {}
    for example in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        exec(example, names)
    assert f"`learned` is `{names['learned']}`" in GUIDE.read_text()
    messages = names["ghost"]["messages"]
    assert [message.get("weight") for message in messages] == [None, 0, None, None]
    assert messages[0]["content"].endswith("\nHi") and messages[2]["content"] == "How are you?"
    assert names["sample"]([messages[2]]) == "a reply to How are you?"


def test_the_table_has_all_kinds_with_their_stages():
    table = re.findall(r"^\| `(\w+)` \|.*\| ([\w, ]+) \|$", GUIDE.read_text(), re.MULTILINE)
    rows = {kind: stages.split(", ") for kind, stages in table if kind not in ("packed", "padded")}
    stages = {purpose: [s for s, wanted in STAGE_PURPOSES.items() if wanted == purpose] for purpose in PURPOSE_KINDS}
    assert rows == {kind: stages[purpose] for purpose, kinds in PURPOSE_KINDS.items() for kind in kinds}
