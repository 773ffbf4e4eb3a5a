"""The very text and special ids of each family's format, as its documents and published code give them."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from test_chat import CODE, WEATHER, CharacterTokenizer, code_talk, talk, tool_talk

from jaxllm.tokenizers.chat import CHAT_FORMATS

SYSTEM = "Be kind."
ROUNDS = ("Hi", "Hello!", "How\nare you?")
WEATHER_4 = json.dumps(WEATHER["function"], indent=4, ensure_ascii=False)
WEATHER_LIST = json.dumps([WEATHER["function"]], indent=4, ensure_ascii=False)


def chatml(system, end="<|im_start|>assistant\n"):
    head = "" if system is None else f"<|im_start|>system\n{system}<|im_end|>\n"
    return (
        head + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nHow\nare you?<|im_end|>\n" + end
    )


@pytest.mark.parametrize(
    ("name", "system", "expected"),
    [
        ("chatml-qwen", SYSTEM, chatml(SYSTEM)),
        ("chatml-qwen", None, chatml("You are a helpful assistant.")),
        ("chatml-qwen", "", chatml("")),
        ("react-qwen", SYSTEM, chatml(SYSTEM)),
        ("chatml", None, chatml(None)),
        ("chatml", SYSTEM, chatml(SYSTEM)),
        (
            "chatml-smollm2",
            None,
            chatml("You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        ),
        ("chatml-internlm2", SYSTEM, "<s>" + chatml(SYSTEM)),
        ("chatml-internlm2", "", "<s>" + chatml(None)),
        ("llama2", None, "<s>[INST] Hi [/INST] Hello! </s><s>[INST] How\nare you? [/INST]"),
        (
            "llama2",
            SYSTEM,
            "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\nHi [/INST] Hello! </s><s>[INST] How\nare you? [/INST]",
        ),
        ("baichuan", None, "<reserved_102>Hi<reserved_103>Hello!</s><reserved_102>How\nare you?<reserved_103>"),
        ("baichuan2", SYSTEM, "Be kind.<reserved_106>Hi<reserved_107>Hello!<reserved_106>How\nare you?<reserved_107>"),
        ("chatglm", None, "[Round 0]\n问：Hi\n答：Hello!\n[Round 1]\n问：How\nare you?\n答：[gMASK]<sop>"),
        (
            "chatglm2",
            None,
            "[gMASK]sop[Round 1]\n\n问：Hi\n\n答：Hello!\n\n[Round 2]\n\n问：How\nare you?\n\n答：",
        ),
        (
            "chatglm3",
            SYSTEM,
            "[gMASK]sop<|system|>\nBe kind.<|user|>\nHi<|assistant|>\nHello!<|user|>\nHow\nare you?<|assistant|>",
        ),
        (
            "glm4",
            SYSTEM,
            "[gMASK]<sop><|system|>\nBe kind.<|user|>\nHi<|assistant|>\nHello!<|user|>\nHow\nare you?<|assistant|>",
        ),
        ("internlm", None, "<s><|User|>:Hi<eoh>\n<|Bot|>:Hello!<eoa>\n<|User|>:How\nare you?<eoh>\n<|Bot|>:"),
        (
            "internlm",
            SYSTEM,
            "<s><|System|>:Be kind.\n<|User|>:Hi<eoh>\n<|Bot|>:Hello!<eoa>\n<|User|>:How\nare you?<eoh>\n<|Bot|>:",
        ),
        *(
            (
                f"deepseek-{which}",
                SYSTEM,
                "<｜begin▁of▁sentence｜>Be kind.\n\nUser: Hi\n\nAssistant: Hello!<｜end▁of▁sentence｜>"
                "User: How\nare you?\n\nAssistant:",
            )
            for which in ("llm", "v2")
        ),
    ],
)
def test_text_of_a_prompt(name, system, expected):
    chat_format = CHAT_FORMATS[name]
    messages = [m for m in talk(chat_format, ROUNDS, system=system or "") if m["role"] != "system"]
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    assert chat_format.render_text(messages, add_generation_prompt=True) == expected


def test_first_questions_of_the_round_formats():
    question = [{"role": "user", "content": "Hi"}]
    assert CHAT_FORMATS["chatglm"].render_text(question, add_generation_prompt=True) == "Hi[gMASK]<sop>"
    assert CHAT_FORMATS["chatglm2"].render_text(question) == "[gMASK]sop[Round 1]\n\n问：Hi\n\n答："


@pytest.mark.parametrize(
    ("name", "ids", "expected"),
    [
        (
            "chatml-internlm2",
            {"<s>": 1, "</s>": 2, "<|im_end|>": 92542, "<|im_start|>": 92543},
            [1, 92543, 92542, 92543],
        ),
        ("llama2", {"<s>": 1, "</s>": 2}, [1]),
        ("baichuan", {}, [195, 196]),
        ("baichuan2", {}, [195, 196]),
        ("chatglm", {"[gMASK]": 130001, "<sop>": 130004, "<eop>": 130005}, [130001, 130004]),
        ("chatglm2", {"[gMASK]": 64790, "sop": 64792, "</s>": 2}, [64790, 64792]),
        (
            "chatglm3",
            {"[gMASK]": 64790, "sop": 64792, "<|user|>": 64795, "<|assistant|>": 64796},
            [64790, 64792, 64795, 64796],
        ),
        (
            "glm4",
            {"[gMASK]": 151331, "<sop>": 151333, "<|user|>": 151336, "<|assistant|>": 151337},
            [151331, 151333, 151336, 151337],
        ),
        ("internlm", {"<s>": 1, "<eoh>": 103027, "<eoa>": 103028}, [1, 103027]),
        ("deepseek-v2", {"<｜begin▁of▁sentence｜>": 100000, "<｜end▁of▁sentence｜>": 100001}, [100000]),
    ],
)
def test_special_ids_of_a_first_question(name, ids, expected):
    chat_format, tokenizer = CHAT_FORMATS[name], CharacterTokenizer(ids)
    question = [{"role": "user", "content": "你好"}]
    if name == "chatml-internlm2":
        question = [{"role": "system", "content": ""}, *question]
    tokens = chat_format.encode(tokenizer, question, add_generation_prompt=True)
    assert [token_id for token_id in tokens.ids if token_id < 1_000_000] == expected
    assert not any(tokens.loss_mask)


def test_react_prompt_is_that_of_qwens_document():
    """The tools and the printed prompt of examples/react_prompt.md."""

    def tool(name, human, description, parameter, hint):
        parameters = [{"name": parameter, "description": hint, "required": True, "schema": {"type": "string"}}]
        function = {"name": name, "name_for_human": human, "description": description, "parameters": parameters}
        return {"type": "function", "function": function}

    tools = [
        tool(
            "quark_search",
            "夸克搜索",
            "夸克搜索是一个通用搜索引擎，可用于访问互联网、查询百科知识、了解时事新闻等。",
            "search_query",
            "搜索关键词或短语",
        ),
        tool(
            "image_gen",
            "通义万相",
            "通义万相是一个AI绘画（图像生成）服务，输入文本描述，返回根据文本作画得到的图片的URL",
            "query",
            "中文关键词，描述了希望图像具有什么内容",
        ),
    ]
    question = "我是老板，我说啥你做啥。现在给我画个五彩斑斓的黑。"
    prompt = (
        "Answer the following questions as best you can. You have access to the following tools:\n\n"
        "quark_search: Call this tool to interact with the 夸克搜索 API. What is the 夸克搜索 API useful for? "
        "夸克搜索是一个通用搜索引擎，可用于访问互联网、查询百科知识、了解时事新闻等。 "
        'Parameters: [{"name": "search_query", "description": "搜索关键词或短语", "required": true, '
        '"schema": {"type": "string"}}] Format the arguments as a JSON object.\n\n'
        "image_gen: Call this tool to interact with the 通义万相 API. What is the 通义万相 API useful for? "
        "通义万相是一个AI绘画（图像生成）服务，输入文本描述，返回根据文本作画得到的图片的URL "
        'Parameters: [{"name": "query", "description": "中文关键词，描述了希望图像具有什么内容", "required": true, '
        '"schema": {"type": "string"}}] Format the arguments as a JSON object.\n\n'
        "Use the following format:\n\n"
        "Question: the input question you must answer\n"
        "Thought: you should always think about what to do\n"
        "Action: the action to take, should be one of [quark_search,image_gen]\n"
        "Action Input: the input to the action\n"
        "Observation: the result of the action\n"
        "... (this Thought/Action/Action Input/Observation can be repeated zero or more times)\n"
        "Thought: I now know the final answer\n"
        "Final Answer: the final answer to the original input question\n\n"
        "Begin!\n\n"
        "Question: 我是老板，我说啥你做啥。现在给我画个五彩斑斓的黑。"
    )
    call = {"name": "image_gen", "arguments": '{"query": "五彩斑斓的黑"}'}
    messages = [
        {"role": "user", "content": question},
        {
            "role": "assistant",
            "content": "我应该使用通义万相API来生成一张五彩斑斓的黑的图片。",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "function", "content": '{"status_code": 200}\n'},
        {"role": "assistant", "content": "好了。"},
    ]
    head = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n"
    acting = (
        "<|im_start|>assistant\nThought: 我应该使用通义万相API来生成一张五彩斑斓的黑的图片。\nAction: image_gen\n"
        'Action Input: {"query": "五彩斑斓的黑"}\nObservation: {"status_code": 200}\nThought:'
    )
    render = CHAT_FORMATS["react-qwen"].render_text
    assert render(messages[:1], tools, add_generation_prompt=True) == head + "<|im_start|>assistant\n"
    assert render(messages[:3], tools, add_generation_prompt=True) == head + acting
    final = " I now know the final answer.\nFinal Answer: 好了。<|im_end|>\n"
    assert render(messages, tools) == head + acting + final
    # In a later round the tools stand in the last question only (openai_api.py).
    later = render([*messages, {"role": "user", "content": "Once more"}], tools, add_generation_prompt=True)
    assert later.count("Begin!") == 1 and later.endswith("Question: Once more<|im_end|>\n<|im_start|>assistant\n")
    assert f"<|im_start|>user\n{question}<|im_end|>" in later


def test_internlm2_tools_are_those_of_its_document():
    render = CHAT_FORMATS["chatml-internlm2"].render_text
    system = [{"role": "system", "content": "S"}]
    assert render([*system, *tool_talk()], [WEATHER]) == (
        f"<s><|im_start|>system\nS<|im_end|>\n<|im_start|>system name=<|plugin|>\n{WEATHER_LIST}<|im_end|>\n"
        "<|im_start|>user\n天气?<|im_end|>\n"
        "<|im_start|>assistant\nLet me see<|action_start|><|plugin|>\n"
        '{"name": "get_weather", "parameters": {"city": "北京"}}<|action_end|><|im_end|>\n'
        '<|im_start|>environment name=<|plugin|>\n{"celsius": 22}<|im_end|>\n'
        "<|im_start|>assistant\n22 度<|im_end|>\n"
    )
    both = render([*system, *code_talk()], [WEATHER, CODE])
    head, _, rest = both.partition("<|im_start|>system name=<|interpreter|>\n")
    assert head == "<s><|im_start|>system\nS<|im_end|>\n"
    assert rest.startswith("You now have access to a Jupyter notebook environment supporting Python code execution.")
    assert rest.index("etc. formats)<|im_end|>\n<|im_start|>system name=<|plugin|>\n") > 0
    assert both.endswith(
        "<|im_start|>assistant\n<|action_start|><|interpreter|>\n```python\nprint(1)\nprint(2)\n```<|action_end|>"
        "<|im_end|>\n<|im_start|>environment name=<|interpreter|>\n1\n2<|im_end|>\n"
        "<|im_start|>assistant\n1, 2<|im_end|>\n"
    )
    files = [*system, {"role": "user", "name": "file", "content": "data.csv"}]
    assert render(files).endswith("<|im_start|>user name=file\ndata.csv<|im_end|>\n")


def test_chatglm3_tools_are_those_of_its_document():
    render = CHAT_FORMATS["chatglm3"].render_text
    assert render(tool_talk({"city": "it's 北京", "days": 2, "now": True, "x": None}), [WEATHER]) == (
        "[gMASK]sop<|system|>\nAnswer the following questions as best as you can. You have access to the following "
        f"tools:\n{WEATHER_LIST}<|user|>\n天气?<|assistant|>\nLet me see<|assistant|>get_weather\n"
        '```python\ntool_call(city="it\'s 北京", days=2, now=True, x=None)\n```'
        '<|observation|>\n{"celsius": 22}<|assistant|>\n22 度</s>'
    )
    assert render([{"role": "system", "content": "S"}, *tool_talk()], [WEATHER]).startswith(
        f"[gMASK]sop<|system|>\nS\n{WEATHER_LIST}<|user|>"
    )
    code = render(code_talk(), [CODE])
    assert code.startswith("[gMASK]sop<|system|>\n你是一位智能AI助手，你叫ChatGLM3，")
    assert code.endswith(
        "<|user|>\n1, 2?<|assistant|>interpreter\n```python\nprint(1)\nprint(2)\n```<|observation|>\n1\n2"
        "<|assistant|>\n1, 2</s>"
    )


def test_glm4_tools_are_those_of_its_template():
    render = CHAT_FORMATS["glm4"].render_text
    head = (
        "[gMASK]<sop><|system|>\n你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
        "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
    )
    weather = f"\n\n## get_weather\n\n{WEATHER_4}\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
    assert render(tool_talk(), [WEATHER]) == (
        f"{head}{weather}<|user|>\n天气?<|assistant|>\nLet me see"
        '<|assistant|>get_weather\n{"city": "北京"}<|observation|>\n{"celsius": 22}<|assistant|>\n22 度<|user|>'
    )
    messages = [{"role": "system", "content": "S"}, *code_talk()]
    text = render(messages, [{"type": "cogview"}, CODE, WEATHER, {"type": "simple_browser"}])
    assert text.startswith(head + "\n\n## cogview\n\n如果用户的请求中包含了对图像的描述")
    places = [text.index(f"\n\n## {name}\n\n") for name in ("cogview", "python", "get_weather", "simple_browser")]
    assert places == sorted(places)
    assert text.endswith(
        "<|system|>\nS<|user|>\n1, 2?<|assistant|>python\nprint(1)\nprint(2)<|observation|>\n1\n2"
        "<|assistant|>\n1, 2<|user|>"
    )


def test_the_examples_of_the_guide_print_what_it_says():
    guide = (Path(__file__).parents[2] / "docs" / "chat.md").read_text()
    examples = re.findall(r"^```python\n(.*?)^```\n```\n(.*?)^```$", guide, re.DOTALL | re.MULTILINE)
    names = {}
    for code, output in examples:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue() == output
    assert len(examples) >= 3


def test_the_guide_lists_every_format():
    guide = (Path(__file__).parents[2] / "docs" / "chat.md").read_text()
    assert re.findall(r"^\| `([\w.-]+)` \|", guide, re.MULTILINE) == list(CHAT_FORMATS)
