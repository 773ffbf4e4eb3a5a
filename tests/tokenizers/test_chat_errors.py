"""What a format cannot express gives one message with the format, the message's place, what was found and expected."""

import re

import pytest
from test_chat import CODE, WEATHER, tool_talk

from jaxllm.errors import InputError
from jaxllm.tokenizers.chat import CHAT_FORMATS

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
TOOL = {"role": "tool", "content": "r"}


def calling(**call):
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def function(**body):
    return calling(type="function", function=body)


@pytest.mark.parametrize(
    ("name", "messages", "message"),
    [
        ("llama2", [], "messages: found none"),
        ("llama2", [SYSTEM], "messages: found only a system message"),
        ("llama2", ["hi"], "messages[0]: found 'hi', expected an object"),
        (
            "llama2",
            [{"role": "critic", "content": ""}],
            "messages[0]: role: found 'critic', expected one of system, user",
        ),
        ("llama2", [{"content": ""}], "messages[0]: role: found None"),
        ("llama2", [{"role": ["user"], "content": ""}], "messages[0]: role: found ['user']"),
        ("llama2", [USER, {"role": "assistant"}], "messages[1]: content: found None, expected a string"),
        ("llama2", [{"role": "user", "content": [{"type": "text"}]}], "messages[0]: content: found [{'type': 'text'}]"),
        ("llama2", [USER | {"text": "x"}], "messages[0]: unknown key 'text'; expected role, content,"),
        ("llama2", [USER | {"name": "Bob"}], "messages[0]: name: found 'Bob'; the format has no place"),
        (
            "llama2",
            [USER, USER],
            "messages[1]: found the user's after the user, expected it after none or the assistant",
        ),
        (
            "llama2",
            [ASSISTANT],
            "messages[0]: found the assistant's after none, expected it after the user or the tool",
        ),
        ("chatml-qwen", [SYSTEM, ASSISTANT], "messages[1]: found the assistant's after none"),
        ("chatml-qwen", [USER, SYSTEM], "messages[1]: found a system message, which must come first"),
        ("chatml-qwen", [USER, ASSISTANT, TOOL], "messages[2]: found the result of a tool; the format has no tools"),
        ("chatml-qwen", tool_talk()[:2], "messages[1].tool_calls[0]: found a tool; the format has no tools"),
        ("chatglm", [SYSTEM, USER], "messages[0]: found a system message; the format has none"),
        ("baichuan", [SYSTEM, USER], "messages[0]: found a system message; the format has none"),
        ("chatglm2", [USER, USER], "messages[1]: found the user's after the user"),
        ("chatglm3", [USER, USER], "messages[1]: found the user's after the user"),
        ("glm4", [USER, TOOL], "messages[1]: found the tool's after the user, expected it after the assistant"),
        ("glm4", [USER, ASSISTANT, TOOL], "messages[2]: found the result of a tool after a message that calls none"),
        ("glm4", [USER | {"tool_calls": [{}]}], "messages[0]: tool_calls: found in the user's message"),
        (
            "glm4",
            [USER, ASSISTANT | {"tool_calls": [{}, {}]}],
            "messages[1]: tool_calls: found [{}, {}], expected a list",
        ),
        (
            "glm4",
            [USER, calling(type="magic")],
            "messages[1].tool_calls[0]: type: found 'magic', expected one of function",
        ),
        ("glm4", [USER, calling(type="cogview", cogview="x")], "messages[1]: tool_calls[0]: found "),
        ("glm4", [USER, function(arguments="{}")], "messages[1]: tool_calls[0].function: found {'arguments': '{}'}"),
        ("glm4", [USER, function(name="f", arguments="{")], "messages[1]: tool_calls[0].function.arguments: found '{'"),
        ("glm4", [USER, function(name="f", arguments="[]")], "expected a JSON object"),
        ("glm4", [USER, function(name="f", arguments={"x": float("nan")})], "messages[1]: tool_calls[0].function.argu"),
        ("glm4", [USER, function(name="f", arguments='{"x": NaN}')], "expected a JSON object"),
        ("glm4", [USER, function(name="f")], "messages[1]: tool_calls[0].function.arguments: found None"),
        (
            "chatglm3",
            [USER, function(name="f", arguments={"a-b": 1})],
            "messages[1]: tool_calls[0].function.arguments: ",
        ),
        ("chatglm3", [USER, function(name="f", arguments={"class": 1})], "found the name 'class', expected names"),
    ],
)
def test_bad_messages(name, messages, message):
    with pytest.raises(InputError, match=f"^chat format {name}: .*{re.escape(message)}") as error:
        CHAT_FORMATS[name].segments(messages)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "tools", "message"),
    [
        ("chatml-qwen", [WEATHER], "tools[0]: found a tool; the format has no tools"),
        ("react-qwen", [CODE], "tools[0]: type: found 'code_interpreter', expected one of function"),
        ("glm4", [WEATHER, WEATHER["function"]], "tools[1]: type: found None"),
        ("glm4", [{"type": "function"}], "tools[0]: found {'type': 'function'}, expected"),
        ("glm4", ["get_weather"], "tools[0]: found 'get_weather', expected a JSON object"),
        ("glm4", [WEATHER | {"function": {"name": "f", "parameters": {1, 2}}}], "tools[0]: found "),
    ],
)
def test_bad_tools(name, tools, message):
    with pytest.raises(InputError, match=f"^chat format {name}: {re.escape(message)}"):
        CHAT_FORMATS[name].segments([USER], tools)


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_no_prompt_for_a_reply_after_a_reply(name):
    with pytest.raises(InputError, match=r"messages\[1\]: found the assistant's, expected another's before its reply"):
        CHAT_FORMATS[name].segments([USER, ASSISTANT], add_generation_prompt=True)


@pytest.mark.parametrize("name", ["chatml", "chatml-smollm2", "chatml-internlm2", "deepseek-v2", "baichuan2", "glm4"])
def test_formats_whose_reference_takes_any_order_take_it(name):
    text = CHAT_FORMATS[name].render_text([USER, USER, ASSISTANT, ASSISTANT])
    assert text.count("q") >= 2
