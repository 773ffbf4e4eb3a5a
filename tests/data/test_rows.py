"""Rows: kinds are told from their fields, and what is wrong with a row is said by field."""

import pytest

from jaxllm.data.rows import (
    PURPOSE_KINDS,
    Dialogue,
    Pair,
    Prompt,
    Text,
    check_purpose,
    detect_kind,
    purpose_of,
    read_row,
)
from jaxllm.errors import InputError

ASKED = [{"role": "user", "content": "q"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "a"}]
OTHER = [*ASKED, {"role": "assistant", "content": "b"}]

ROWS = {
    "messages": {"messages": ANSWERED},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "input": "", "output": "a"},
    "prompt_response": {"prompt": "q", "completion": "a"},
    "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "prompt": {"prompt": "q", "answer": "4"},
    "text": {"text": "q a"},
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_kind_is_told_from_the_fields(kind):
    assert detect_kind(ROWS[kind]) == kind
    assert detect_kind(ROWS[kind] | {"id": 7, "source": "x"}, purpose_of(kind)) == kind


def test_messages_are_a_prompt_where_one_is_wanted_or_a_reply_is_missing():
    assert detect_kind({"messages": ASKED}) == "prompt"
    assert detect_kind({"messages": ASKED}, "sft") == "messages"
    assert detect_kind({"messages": ANSWERED}, "prompt") == "prompt"
    assert detect_kind({"prompt": "q", "response": "a"}, "prompt") == "prompt"


def test_empty_columns_are_no_fields():
    row = {"messages": None, "chosen": None, "rejected": None, "conversations": None, "instruction": "q", "output": "a"}
    assert detect_kind(row) == "alpaca"


@pytest.mark.parametrize("kind", ["messages", "sharegpt", "alpaca", "prompt_response"])
def test_a_question_and_an_answer_are_the_same_conversation_in_every_kind(kind):
    assert read_row(ROWS[kind], kind) == Dialogue(ANSWERED)
    with_system = read_row(ROWS[kind], kind, system="Be kind.")
    assert with_system == Dialogue([{"role": "system", "content": "Be kind."}, *ANSWERED])


def test_a_system_message_of_its_own_is_kept():
    own = [{"role": "system", "content": "Own."}]
    assert read_row({"messages": [*own, *ANSWERED]}, "messages", system="Other.").messages == [*own, *ANSWERED]
    assert read_row(ROWS["alpaca"] | {"system": "Own."}, "alpaca", system="Other.").messages == [*own, *ANSWERED]


def test_alpaca_has_inputs_and_a_history():
    row = {"instruction": "Add", "input": "1 2", "output": "3", "history": [["Hi", "Hello"]]}
    contents = [message["content"] for message in read_row(row, "alpaca").messages]
    assert contents == ["Hi", "Hello", "Add\n1 2", "3"]


def test_sharegpt_has_calls_and_results():
    row = {
        "conversations": [
            {"from": "human", "value": "Weather?"},
            {"from": "function_call", "value": '{"name": "get_weather", "arguments": {"city": "Paris"}}'},
            {"from": "observation", "value": "22"},
            {"from": "gpt", "value": "Mild"},
        ],
        "tools": '[{"name": "get_weather", "parameters": {}}]',
    }
    found = read_row(row, "sharegpt")
    assert [message["role"] for message in found.messages] == ["user", "assistant", "tool", "assistant"]
    assert found.messages[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}
    assert found.tools == [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


def test_replies_in_a_prompt_are_context():
    row = {"prompt": [*ANSWERED, *ASKED], "completion": "c"}
    assert [message.get("weight") for message in read_row(row, "prompt_response").messages] == [None, 0, None, None]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": ASKED, "chosen": ANSWERED[1:], "rejected": OTHER[1:]},
        {"prompt": "q", "chosen": ANSWERED, "rejected": OTHER},
        {"chosen": ANSWERED, "rejected": OTHER},
    ],
)
def test_pairs_may_be_written_in_several_ways(row):
    assert read_row(row, "preference") == Pair(ASKED, ANSWERED[1:], OTHER[1:])


@pytest.mark.parametrize("margin", ["significantly", "negligible", 0.5, 3])
def test_margins_are_labels_or_numbers(margin):
    assert read_row(ROWS["preference"] | {"margin": margin}, "preference").margin == margin


@pytest.mark.parametrize("row", [{"prompt": "q"}, {"prompt": ASKED}, {"messages": ASKED}])
@pytest.mark.parametrize("name", ["reference", "answer"])
def test_prompts_keep_their_row_and_reference(row, name):
    row = row | {name: [1, 2], "level": 3}
    assert read_row(row, "prompt") == Prompt(ASKED, [1, 2], row)


def test_texts():
    assert read_row({"body": "x"}, "text", text_key="body") == Text("x")


def bad(kind, **fields):
    return kind, ROWS[kind] | fields


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (bad("messages", messages=[]), "messages: found an empty list, expected a list"),
        (bad("messages", messages="q"), "messages: found a string, expected a list"),
        (
            bad("messages", messages=["q"]),
            r"messages\[0\]: found a string, expected an object with 'role' and 'content'",
        ),
        (
            bad("messages", messages=[{"role": "bot", "content": "x"}]),
            r"messages\[0\]: role: found 'bot', expected one of",
        ),
        (
            bad("messages", messages=[{"content": "x"}]),
            r"messages\[0\]: role: found None, expected one of system, user",
        ),
        (bad("messages", messages=[{"role": "user", "content": 3}]), r"messages\[0\]: content: found a number"),
        (
            bad("messages", messages=[*ASKED, {"role": "assistant", "content": ""}]),
            r"\[1\]: the assistant's .* is empty",
        ),
        (
            bad("messages", messages=[*ASKED, {"role": "assistant", "content": " "}]),
            r"\[1\]: the assistant's .* is blank",
        ),
        (bad("messages", messages=ASKED), "messages: found no message of the assistant to train on"),
        (bad("messages", messages=[*ASKED, ANSWERED[1] | {"weight": 0}]), "no message of the assistant to train on"),
        (
            bad("messages", messages=[ANSWERED[1] | {"tool_calls": "x"}]),
            "tool_calls: found 'x', expected a list of objects",
        ),
        (bad("messages", tools=[3]), "tools: found a list, expected a list of objects"),
        (bad("messages", tools="{"), "tools: found text that is no JSON"),
        (bad("sharegpt", conversations=[{"from": "bot", "value": "x"}]), r"conversations\[0\]: from: found 'bot'"),
        (bad("sharegpt", conversations=[{"from": "gpt", "value": None}]), r"conversations\[0\]: value: found null"),
        (
            bad("sharegpt", conversations=[{"from": "function_call", "value": "go"}]),
            "value: found text that is no JSON",
        ),
        (
            bad("sharegpt", conversations=[{"from": "function_call", "value": "{}"}]),
            "value: found '{}', expected a call",
        ),
        (bad("alpaca", instruction=""), "instruction: found no text, and none in input"),
        (bad("alpaca", output=" "), "output: found blanks, expected text"),
        (bad("alpaca", history=[["q"]]), r"history\[0\]: found \['q'\], expected a question and an answer"),
        (bad("prompt_response", prompt=""), "prompt: found an empty string, expected text"),
        (bad("prompt_response", completion=3), "completion: found a number, expected a text or a list of messages"),
        (bad("preference", chosen="b"), "chosen and rejected: found the same answer twice"),
        (bad("preference", prompt=None), "chosen: found an answer alone, expected the field 'prompt' or messages"),
        (bad("preference", chosen=ASKED), "chosen: found the user's message at its end, expected the assistant's"),
        (
            bad("preference", chosen=[ANSWERED[1] | {"weight": 0}]),
            "chosen: .* expected the assistant's, not of weight 0",
        ),
        (bad("preference", chosen=ANSWERED, prompt="p"), "prompt and chosen: found different prompts"),
        (
            bad("preference", chosen=ANSWERED, prompt=None, rejected=[*ANSWERED, *OTHER]),
            "chosen and rejected: found answers to different prompts, expected the same messages before",
        ),
        (bad("preference", margin="much"), "margin: found 'much', expected a number or one of significantly, better"),
        (bad("preference", margin=float("nan")), "margin: found nan, expected a number"),
        (bad("preference", margin=True), "margin: found True, expected a number"),
        (bad("prompt", prompt=ANSWERED), "the prompt ends with the assistant's message, expected the user's"),
        (bad("prompt", prompt="q", system=3), "system: found a number, expected a string"),
        (bad("text", text=None), "text: found null, expected a string"),
    ],
)
def test_what_is_wrong_is_named(row, problem):
    kind, fields = row
    with pytest.raises(InputError, match=problem):
        read_row(fields, kind)


def test_rows_of_no_kind_are_named_with_their_fields():
    with pytest.raises(
        InputError, match="cannot tell what the row is: found the fields 'question', 'id'; expected mes"
    ):
        detect_kind({"question": "q", "id": 1})


@pytest.mark.parametrize("purpose", PURPOSE_KINDS)
def test_rows_are_refused_where_they_are_of_no_use(purpose):
    for kind in ROWS:
        if kind in PURPOSE_KINDS[purpose]:
            check_purpose(kind, purpose)
        else:
            with pytest.raises(InputError, match=f"found a {kind} row; .* takes .*{PURPOSE_KINDS[purpose][0]}"):
                check_purpose(kind, purpose)
