"""`jaxllm data check`: what it reports, and how it exits."""

import pytest

from jaxllm.cli import main
from jaxllm.data.check import marked_runs, rows_of_epoch
from jaxllm.data.example_rows import ExampleRowIterator, ExampleRows, PreferenceRows
from jaxllm.data.rows import Dialogue
from tests.data.chats import chat_tokenizer, make_encoder, make_set, talk, tool_talk, write_rows

ROW = {"messages": talk("q", "a")}
CONFIG = """
run_dir: runs/x
stage: STAGE
tokenizer: tok
model: {name: llama2-7b}
chat: {format: chatml}
data: {train: [{path: a.jsonl}], seq_len: 64, OPTIONS}
train: {steps: 10, batch_size: 2}
"""


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Write rows to a.jsonl, run `jaxllm data check` there and return (exit code, output)."""
    monkeypatch.chdir(tmp_path)
    chat_tokenizer("chatml").save(tmp_path / "tok")

    def run(rows, *arguments):
        write_rows(tmp_path / "a.jsonl", rows)
        code = main(["data", "check", *arguments])
        out, err = capsys.readouterr()
        return code, out + err

    return run


def with_config(tmp_path, stage="sft", options="max_bad_rows: 0"):
    (tmp_path / "run.yaml").write_text(CONFIG.replace("STAGE", stage).replace("OPTIONS", options))
    return ("--config", "run.yaml")


def test_without_a_tokenizer_the_structure_is_checked(check):
    code, out = check([ROW, ROW, {"messages": talk("q", "")}], "a.jsonl", "--max-bad-rows", "1")
    assert code == 0
    assert "rows: 2 messages\n1 bad row (max_bad_rows allows 1)\n  a.jsonl:3: messages[1]: the assistant's" in out
    assert "rows that repeat an earlier one: 1\n  a.jsonl:2 repeats a.jsonl:1" in out
    assert "no --tokenizer: neither lengths nor what is trained were checked" in out


def test_with_a_tokenizer_lengths_and_an_example_are_shown(check):
    rows = [ROW, {"messages": talk("q" * 50, "a")}]
    code, out = check(rows, "a.jsonl", "--tokenizer", "tok", "--stage", "sft", "--seq-len", "60")
    assert code == 0
    assert "chat format: chatml\n" in out
    assert "bad rows: 0\n" in out
    assert "in a row min 23, median 72, p90 72, p99 72, max 72\nlonger than 60 tokens: 1\n" in out
    assert "trained: 4 of 95 tokens (4.2%)\nwithout a stop token in what is trained: 0\n" in out
    assert "<|im_start|>assistant\n[trained]a<|im_end|>[/trained]\n" in out


def test_conversations_that_end_with_a_call_may_teach_no_stop(check, tmp_path):
    chat_tokenizer("react-qwen").save(tmp_path / "react")
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    row = {"messages": tool_talk()[:2], "tools": tools}
    _, out = check([row], "a.jsonl", "--tokenizer", "react", "--chat-format", "react-qwen")
    assert "without a stop token in what is trained: 1" in out


def test_more_bad_rows_than_allowed_are_a_failure(check):
    bad = {"messages": [{"role": "bot", "content": "x"}]}
    code, out = check([ROW, *[bad] * 5], "a.jsonl", "--max-bad-rows", "4")
    assert code == 2
    assert "5 bad rows (max_bad_rows allows 4)\n" in out and out.count("role: found 'bot'") == 3 and "  ...\n" in out


def test_rows_for_another_stage_are_a_failure(check):
    code, out = check([ROW], "a.jsonl", "--stage", "dpo")
    assert code == 2
    assert "error: a.jsonl:1: found a messages row; stage reward or dpo takes preference rows" in out


def test_a_config_says_what_is_read_and_how_long_an_epoch_is(check, tmp_path):
    code, out = check([ROW] * 5, *with_config(tmp_path))
    assert code == 0
    # Two conversations of 23 tokens have room in a row of 64.
    assert "one epoch: 3 packed rows (60% full), 2 steps of 2 rows" in out
    _, out = check([ROW] * 5, *with_config(tmp_path, options="packing: padded"))
    assert "one epoch: 5 padded rows (36% full), 3 steps of 2 rows" in out


def test_what_the_run_would_refuse_as_too_long_is_a_bad_row(check, tmp_path):
    rows = [ROW, {"messages": talk("q" * 50, "a")}]
    code, out = check(rows, *with_config(tmp_path))
    assert code == 2
    assert "a.jsonl:2: found 72 tokens, expected at most 64; data.seq_len gives more room" in out
    code, out = check(rows, *with_config(tmp_path, options="too_long: skip"))
    assert code == 0 and "longer than 64 tokens: 1" in out


def test_pairs_are_shown_side_after_side(check, tmp_path):
    rows = [{"prompt": "q", "chosen": "good", "rejected": "bad", "margin": "better"}]
    code, out = check(rows, *with_config(tmp_path, "dpo"))
    assert code == 0
    assert "a.jsonl:1, chosen; what is trained is between marks:" in out
    assert "[trained]good<|im_end|>[/trained]\na.jsonl:1, rejected;" in out
    assert "[trained]bad<|im_end|>[/trained]" in out


def test_prompts_have_the_room_that_answers_leave(check, tmp_path):
    config = with_config(tmp_path, "grpo")
    with open("run.yaml", "a") as file:
        file.write("rollout: {prompts: 2, samples: 2, max_new_tokens: 40}\nrewards: [{kind: exact}]\n")
    code, out = check([{"prompt": "q"}] * 3, *config)
    assert code == 0 and "one epoch: 2 rounds of 2 prompts" in out and "longer than 24 tokens: 0" in out
    code, out = check([{"prompt": "q" * 9}], *config)
    assert code == 2 and "found 28 tokens, expected at most 24" in out


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ((), "found no files to check; name some, or a --config with data.train"),
        (("b.jsonl",), "b.jsonl: no such file or folder"),
        (("a.jsonl", "--chat-format", "chatml"), "--chat-format: a chat format needs the --tokenizer"),
        (("a.jsonl", "--tokenizer", "tok", "--chat-format", "x"), "chat.format: found 'x', expected one of"),
        (("a.jsonl", "--tokenizer", "tok", "--chat-format", "glm4"), "chat format glm4: the tokenizer has no"),
    ],
)
def test_what_cannot_be_checked_is_refused(check, arguments, problem):
    code, out = check([ROW], *arguments)
    assert code == 2 and f"jaxllm: error: {problem}" in out


def test_texts_of_pretraining_are_refused(check, tmp_path):
    code, out = check([{"text": "x"}], *with_config(tmp_path, "pretrain"))
    assert code == 2 and "stage: found 'pretrain'" in out


@pytest.mark.parametrize("packed", [True, False])
def test_an_epoch_has_as_many_rows_as_the_loader_makes_of_it(tmp_path, packed):
    rows = [{"messages": talk("q" * (7 * n % 31 + 1), "a")} for n in range(20)]
    examples = make_set(tmp_path, rows)
    rule = ExampleRows(places=make_encoder().places, packed=packed)
    made = len(list(ExampleRowIterator(rule.items(examples, 100), 100, rule)))
    assert rows_of_epoch(examples.lengths().tolist(), 100, rule.most_items) == made


def test_an_epoch_of_pairs_has_as_many_rows_as_the_loader_makes_of_it(tmp_path):
    rows = [{"prompt": "q" * (n % 7 + 1), "chosen": "a", "rejected": "b"} for n in range(20)]
    pairs = make_set(tmp_path, rows, "preference")
    rule = PreferenceRows(places=make_encoder().places, pairs_per_row=2)
    made = len(list(ExampleRowIterator(rule.items(pairs, 200), 200, rule)))
    assert rows_of_epoch(pairs.lengths().reshape(-1, 2).sum(axis=1).tolist(), 200, 2) == made


def test_a_token_that_teaches_another_is_shown_with_it():
    encoder = make_encoder("baichuan2")
    tokens = encoder.dialogue(Dialogue(talk("q1", "a1", "q2", "a2")))
    runs = list(marked_runs(encoder.tokenizer, tokens))
    taught = encoder.tokenizer.decode([2])
    user, assistant = (encoder.tokenizer.decode([id]) for id in (195, 196))
    assert runs == [
        *((f"{user}q1{assistant}", False), ("a1", True), (f"{user}→{taught}", True)),
        *((f"q2{assistant}", False), (f"a2{taught}", True)),
    ]
