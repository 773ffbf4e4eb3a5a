"""Replies become messages: calls only where they are well formed, and nothing of a reply is ever executed."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat import CODE, WEATHER, code_talk, tool_talk

from jaxllm.errors import InputError
from jaxllm.tokenizers.chat import CHAT_FORMATS

TOOL_FORMATS = ("react-qwen", "chatml-internlm2", "chatglm3", "glm4")
CODE_FORMATS = ("chatml-internlm2", "chatglm3", "glm4")

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


def reply_text(chat_format, messages, tools):
    """Return what the assistant wrote in the last message: the text beyond the prompt."""
    prompt = chat_format.render_text(messages[:-1], tools, add_generation_prompt=True)
    whole = chat_format.render_text(messages, tools)
    assert whole.startswith(prompt)
    return whole.removeprefix(prompt).removesuffix("\n")


def call_of(message):
    (call,) = message["tool_calls"]
    return call["function"]["name"], json.loads(call["function"]["arguments"])


@pytest.mark.parametrize("name", TOOL_FORMATS)
@given(arguments=st.dictionaries(st.sampled_from(["city", "days"]), values))
def test_a_call_is_read_back(name, arguments):
    chat_format = CHAT_FORMATS[name]
    messages = tool_talk()[:2]
    messages[1]["tool_calls"][0]["function"]["arguments"] = arguments
    message = chat_format.parse(reply_text(chat_format, messages, [WEATHER]), [WEATHER])
    assert (message["role"], message["content"]) == ("assistant", "Let me see")
    assert call_of(message) == ("get_weather", arguments)
    # What was read can be said again.
    again = chat_format.render_text([messages[0], message], [WEATHER])
    assert again == chat_format.render_text(messages, [WEATHER])


@pytest.mark.parametrize("name", CODE_FORMATS)
def test_code_is_read_back(name):
    chat_format, messages = CHAT_FORMATS[name], code_talk()[:2]
    message = chat_format.parse(reply_text(chat_format, messages, [CODE]), [CODE])
    assert message == messages[1] | {"content": ""}


@pytest.mark.parametrize("name", CHAT_FORMATS)
def test_an_answer_is_read_back(name):
    chat_format = CHAT_FORMATS[name]
    tools = [WEATHER] if chat_format.rules.tool_types else None
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "So, 22 度.\nThat is warm"}]
    assert chat_format.parse(reply_text(chat_format, messages, tools), tools) == messages[1]


@pytest.mark.parametrize(
    ("name", "reply"),
    [
        ("react-qwen", "Thought: x\nAction: get_weather\nAction Input: {broken\nObservation:"),
        ("react-qwen", "Thought: x\nAction Input: {}\nAction: get_weather"),
        ("chatml-internlm2", 'x<|action_start|><|plugin|>\n{"name": 3, "parameters": {}}<|action_end|>'),
        ("chatml-internlm2", 'x<|action_start|><|interpreter|>\n{"name": "f", "parameters": {}}<|action_end|>'),
        ("chatglm3", "get_weather\n```python\ntool_call(city=__import__('os').getcwd())\n```"),
        ("chatglm3", "get_weather\n```python\nopen(city='x')\n```"),
        ("chatglm3", "get_weather\n```python\ntool_call('x')\n```"),
        ("chatglm3", "get_weather\n```python\ntool_call(**{'city': 'x'})\n```"),
        ("chatglm3", "get_weather\n```python\ntool_call(city={1, 2})\n```"),
        ("chatglm3", "get_weather\n```python\ntool_call(city=" + "(" * 500 + ")\n```"),
        ("chatglm3", "get_weather\ntool_call(city='x')"),
        ("chatglm3", "get_weather\n```python\ntool_call(days=1e999)\n```"),
        ("glm4", "get_weather\n[1]"),
        ("glm4", "get_weather\n" + '{"a": ' * 100_000),
        ("glm4", 'other\n{"city": "x"}'),
    ],
)
def test_what_is_no_well_formed_call_is_an_answer(name, reply):
    message = CHAT_FORMATS[name].parse(reply, [WEATHER])
    assert set(message) == {"role", "content"}
    assert message["content"] and message["content"] in reply


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_without_tools_nothing_is_a_call(name):
    chat_format = CHAT_FORMATS[name]
    message = chat_format.parse(reply_text(chat_format, tool_talk()[:2], [WEATHER]))
    assert "tool_calls" not in message and "get_weather" in message["content"]


def test_replies_of_glm_are_tidied_as_published():
    parse = CHAT_FORMATS["chatglm"].parse
    assert parse(" 我是[[训练时间]]的模型,好吗?对! a,b <eop>")["content"] == "我是2023年的模型，好吗？对！ a,b"
    assert parse("1:中文;文")["content"] == "1：中文；文"
    assert CHAT_FORMATS["chatglm2"].parse(" [[训练时间]],好 ")["content"] == "2023年,好"
    for name in ("chatglm3", "glm4"):
        assert CHAT_FORMATS[name].parse("\n [[训练时间]]好\n<|user|>")["content"] == "2023年好"
        assert CHAT_FORMATS[name].parse("Hello")["content"] == "Hello"


def test_react_answers_and_thoughts():
    parse = CHAT_FORMATS["react-qwen"].parse
    assert parse(" I now know the final answer.\nFinal Answer: 22", [WEATHER])["content"] == "22"
    assert parse("Thought: no tool helps\nFinal Answer: hi\nthere", [WEATHER])["content"] == "hi\nthere"
    assert parse("Just so", [WEATHER])["content"] == "Just so"
    message = parse(' go on\nAction: get_weather\nAction Input: {"city": "x"}\nObservation:', [WEATHER])
    assert message["content"] == "go on" and call_of(message) == ("get_weather", {"city": "x"})


def test_a_stop_token_at_the_end_is_no_content():
    assert CHAT_FORMATS["chatml-qwen"].parse("Hi<|im_end|>")["content"] == "Hi"
    assert CHAT_FORMATS["llama2"].parse(" Hi </s>")["content"] == "Hi"
    assert CHAT_FORMATS["deepseek-v2"].parse(" Hi")["content"] == "Hi"


def test_bad_tools_are_refused_when_parsing():
    with pytest.raises(InputError, match=r"chat format glm4: tools\[0\]: type: found 'magic'"):
        CHAT_FORMATS["glm4"].parse("x", [{"type": "magic"}])
