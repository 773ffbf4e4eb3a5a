"""The exported jinja templates write what the formats write."""

import json

import pytest
from test_chat import CODE, WEATHER, all_formats, bpe_tokenizer, character_tokenizer, code_talk, talk, tool_talk

from jaxllm.tokenizers.chat import CHAT_FORMATS, Special

jinja2 = pytest.importorskip("jinja2")
sandbox = pytest.importorskip("jinja2.sandbox")


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """The filter of this name in transformers, which replaces jinja's own."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def render(chat_format, messages, tools=None, add_generation_prompt=False):
    """Render with the environment and the variables of transformers' apply_chat_template."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    deepseek = chat_format.name.startswith("deepseek")
    return environment.from_string(chat_format.jinja_template()).render(
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=add_generation_prompt,
        bos_token="<｜begin▁of▁sentence｜>" if deepseek else "<s>",
        eos_token="<｜end▁of▁sentence｜>" if deepseek else "</s>",
    )


def conversations(chat_format):
    """Return (messages, tools) that the format can express: with and without system, tools, built-in tools."""
    rules = chat_format.rules
    text = 'It\'s "quoted" \\n {{ braces }}\n\n谢谢 '
    cases = [(talk(chat_format, [text, "A", "B", text], system=text), None)]
    if rules.has_system:
        cases.append((talk(chat_format)[1:], None))
        cases.append((talk(chat_format, system=""), None))
    if rules.tool_types:
        system = [{"role": "system", "content": "S"}]
        again = [{"role": "user", "content": "Again\n"}, *tool_talk({"city": "O'Hare", "n": [1, None, True]})]
        cases += [(tool_talk(), [WEATHER]), ([*system, *tool_talk()], [WEATHER, WEATHER]), (tool_talk(), None)]
        cases += [([*tool_talk(), *again[1:]], [WEATHER])]
        cases += [([*talk(chat_format), *again[1:]], [WEATHER])]
    if "code_interpreter" in rules.tool_types:
        cases += [(code_talk(), [CODE]), ([*code_talk(), *tool_talk()], [CODE, WEATHER])]
    if "cogview" in rules.tool_types:
        picture = {"role": "assistant", "tool_calls": [{"type": "cogview", "cogview": {"input": "a cat"}}]}
        tools = [{"type": "cogview"}, WEATHER, {"type": "simple_browser"}, CODE]
        cases.append(([{"role": "user", "content": "A cat!"}, picture], tools))
    return cases


@all_formats
def test_a_template_writes_the_same_text(chat_format):
    for messages, tools in conversations(chat_format):
        for count in range(1 + (messages[0]["role"] == "system"), len(messages) + 1):
            part = messages[:count]
            assert render(chat_format, part, tools) == chat_format.render_text(part, tools)
            if part[-1]["role"] != "assistant":
                expected = chat_format.render_text(part, tools, add_generation_prompt=True)
                assert render(chat_format, part, tools, True) == expected


@all_formats
def test_a_template_gives_the_same_ids(chat_format):
    tokenizers = [character_tokenizer(chat_format)]
    # The formats that fix ids cannot be tried with a vocabulary that gives its bytes the same ids.
    if not any(isinstance(s, Special) and s.id is not None for s in chat_format.segments(talk(chat_format))):
        tokenizers.append(bpe_tokenizer(chat_format))
    for tokenizer in tokenizers:
        messages = talk(chat_format)
        ids = tokenizer.encode(render(chat_format, messages), allow_special=True)
        assert ids == chat_format.encode(tokenizer, messages).ids


@all_formats
def test_a_template_refuses_what_the_format_refuses(chat_format):
    messages = [{"role": "user", "content": "x"}, {"role": "critic", "content": "y"}]
    with pytest.raises(jinja2.exceptions.TemplateError, match=r"the chat format .* (no role|in turn)"):
        render(chat_format, messages)
    if not chat_format.rules.tool_types:
        with pytest.raises(jinja2.exceptions.TemplateError, match="has no tools"):
            render(chat_format, messages[:1], [WEATHER])


def test_text_arguments_are_written_verbatim_but_cannot_become_python():
    messages = tool_talk('{"city":  "x"}')
    for name in ("react-qwen", "chatml-internlm2", "glm4"):
        text = CHAT_FORMATS[name].render_text(messages, [WEATHER])
        assert '{"city":  "x"}' in text and render(CHAT_FORMATS[name], messages, [WEATHER]) == text
    assert "tool_call(city='x')" in CHAT_FORMATS["chatglm3"].render_text(messages, [WEATHER])
    with pytest.raises(jinja2.exceptions.TemplateError, match="as an object, not as text"):
        render(CHAT_FORMATS["chatglm3"], messages, [WEATHER])


def test_smollm2s_own_template_writes_the_same_text():
    """The template in tokenizer.chat_template of SmolLM2-135M-Instruct's GGUF file."""
    published = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    chat_format = CHAT_FORMATS["chatml-smollm2"]
    for messages in (talk(chat_format), talk(chat_format)[1:]):
        text = jinja2.Template(published).render(messages=messages, add_generation_prompt=False)
        # jinja2 drops a line break at the very end of a template only, so the text is whole.
        assert text == chat_format.render_text(messages)
