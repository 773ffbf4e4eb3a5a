"""What every chat format must keep: prompts are beginnings of conversations, replies and their ends are trained on."""

import dataclasses
import os
import re
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from vocabulary_files import read_asset

from jaxllm.errors import InputError
from jaxllm.tokenizers import Tokenizer, load_tokenizer
from jaxllm.tokenizers.chat import CHAT_FORMATS, IGNORED, Special
from jaxllm.tokenizers.tiktoken_bpe import QWEN_FILE, QWEN_PATTERN, TiktokenBPE

all_formats = pytest.mark.parametrize("chat_format", CHAT_FORMATS.values(), ids=CHAT_FORMATS)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "天气 of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CODE = {"type": "code_interpreter"}


class CharacterTokenizer(Tokenizer):
    """One id for each character, from 1,000,000 on, and special tokens below."""

    vocab_size = 3_000_000
    bos_id = eos_id = pad_id = None
    fingerprint = "characters"

    def __init__(self, special_tokens):
        self.special_tokens = dict(special_tokens)

    def encode(self, text, *, allow_special=False):
        if not allow_special:
            return [1_000_000 + ord(character) for character in text]
        pieces = re.split("|".join(f"({re.escape(token)})" for token in self.special_tokens), text)
        return [id_ for piece in pieces if piece for id_ in self._piece(piece)]

    def _piece(self, piece):
        return [self.special_tokens[piece]] if piece in self.special_tokens else self.encode(piece)

    def encode_to_numpy(self, text):
        return np.array(self.encode(text), np.int32)

    def token_bytes(self, token_id):
        names = {id_: text for text, id_ in self.special_tokens.items()}
        return (names.get(token_id) or chr(token_id - 1_000_000)).encode()

    def save(self, folder):
        raise InputError("characters are not saved")


def special_texts(chat_format):
    """Return the special tokens of a format: those that end replies and those of sample conversations."""
    samples = [talk(chat_format)]
    if "code_interpreter" in chat_format.rules.tool_types:
        samples.append(code_talk())
    if chat_format.rules.tool_types:
        samples.append(tool_talk())
    texts = dict.fromkeys(token.text for token in chat_format.stop_tokens)
    for messages in samples:
        tools = [WEATHER] if chat_format.rules.tool_types else None
        for segment in chat_format.segments(messages, tools):
            if isinstance(segment, Special):
                texts.setdefault(segment.text)
    return list(texts)


def talk(chat_format, contents=("Hi", "Hello!", "How\nare you?", "Well, 谢谢"), system="Be kind."):
    messages = [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *messages] if chat_format.rules.has_system else messages


def tool_talk(arguments=None):
    call = {"name": "get_weather", "arguments": arguments or {"city": "北京"}}
    return [
        {"role": "user", "content": "天气?"},
        {"role": "assistant", "content": "Let me see", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": '{"celsius": 22}', "name": "get_weather"},
        {"role": "assistant", "content": "22 度"},
    ]


def code_talk():
    call = {"type": "code_interpreter", "code_interpreter": {"input": "print(1)\nprint(2)"}}
    return [
        {"role": "user", "content": "1, 2?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "1\n2"},
        {"role": "assistant", "content": "1, 2"},
    ]


def character_tokenizer(chat_format):
    # Below 195 and not 2, which Baichuan's formats name by id.
    specials = {text: 10 + k for k, text in enumerate(special_texts(chat_format))}
    return CharacterTokenizer(specials | published_ids(chat_format))


def published_ids(chat_format):
    """Return the ids that the format itself names."""
    segments = chat_format.segments(talk(chat_format))
    return {s.text: s.id for s in [*segments, *chat_format.stop_tokens] if isinstance(s, Special) and s.id is not None}


def bpe_tokenizer(chat_format):
    """Return a byte-level BPE in which line breaks, blanks and colons merge with what follows them."""
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [b"\n\n", b": ", b" H", b"He", b"\n\n\n", "？".encode()[:2], b"User", b"Assistant"]
    specials = {text: len(tokens) + k for k, text in enumerate(special_texts(chat_format))}
    return TiktokenBPE(tokens, pattern=QWEN_PATTERN, special_tokens=specials, normalization=None)


def check_last_reply(chat_format, tokenizer, messages, tools=None):
    """Check that the prompt begins the conversation, and that what follows is trained on up to the end token."""
    prompt = chat_format.encode(tokenizer, messages[:-1], tools, add_generation_prompt=True)
    whole = chat_format.encode(tokenizer, messages, tools)
    start = len(prompt.ids)
    assert whole.ids[:start] == prompt.ids
    assert prompt.labels == whole.labels[:start]
    trained = np.array(whole.loss_mask[start:])
    length = int(trained.sum())
    assert trained[:length].all() and not trained[length:].any()
    reply = whole.labels[start : start + length]
    assert reply == whole.ids[start : start + length]
    assert reply[-1] in chat_format.stop_ids(tokenizer)
    # After it comes nothing but the line break of ChatML's layout.
    assert tokenizer.decode(whole.ids[start + length :]) in ("", "\n")
    return whole


@all_formats
@given(contents=st.lists(st.text(max_size=12), min_size=4, max_size=4), rounds=st.integers(1, 2))
def test_a_reply_and_its_end_token_are_trained_on_and_nothing_else(chat_format, contents, rounds):
    tokenizer = TOKENIZERS[chat_format.name]
    messages = talk(chat_format, contents[: 2 * rounds])
    whole = check_last_reply(chat_format, tokenizer, messages)
    ends = [label for label in whole.labels if label in chat_format.stop_ids(tokenizer)]
    # ChatGLM-6B and ChatGLM2 write earlier replies as part of the prompt, without an end.
    assert len(ends) == (1 if chat_format.name in ("chatglm", "chatglm2") else rounds)
    trained_text = "".join(tokenizer.decode([label]) for label in whole.labels if label >= 1_000_000)
    replies = contents[1 : 2 * rounds : 2]
    if chat_format.name in ("chatml-qwen", "chatml", "chatml-smollm2", "chatml-internlm2", "baichuan", "baichuan2"):
        assert trained_text == "".join(replies)


TOKENIZERS = {name: character_tokenizer(chat_format) for name, chat_format in CHAT_FORMATS.items()}


@pytest.mark.parametrize("name", ["chatml-internlm2", "react-qwen", "chatglm3", "glm4"])
def test_a_call_ends_its_turn_and_results_are_not_trained_on(name):
    chat_format, tokenizer = CHAT_FORMATS[name], TOKENIZERS[name]
    messages = tool_talk()
    for count in (2, 4):
        prompt = chat_format.encode(tokenizer, messages[: count - 1], [WEATHER], add_generation_prompt=True)
        whole = chat_format.encode(tokenizer, messages[:count], [WEATHER])
        assert whole.ids[: len(prompt.ids)] == prompt.ids
        assert not any(prompt.loss_mask[-3:])
    call = chat_format.encode(tokenizer, messages[:2], [WEATHER])
    trained = tokenizer.decode([label for label in call.labels if label != IGNORED])
    assert trained.endswith(
        {"react-qwen": "\nObservation:", "chatml-internlm2": "<|action_end|><|im_end|>"}.get(name, "<|observation|>")
    )
    whole = chat_format.encode(tokenizer, messages, [WEATHER])
    trained = tokenizer.decode([label for label in whole.labels if label != IGNORED])
    assert "get_weather" in trained and "22 度" in trained and "celsius" not in trained and "天气" not in trained


@all_formats
def test_special_tokens_in_content_stay_text(chat_format):
    tokenizer = TOKENIZERS[chat_format.name]
    texts = special_texts(chat_format)
    harmless = chat_format.encode(tokenizer, talk(chat_format, ["x", "y", "z", "w"]))
    hostile = chat_format.encode(tokenizer, talk(chat_format, ["x".join(texts), "y".join(texts), "z", "w"]))

    def count(tokens):
        return sum(token_id < 1_000_000 for token_id in tokens.ids)

    assert count(hostile) == count(harmless)


@pytest.mark.parametrize("name", ["llama2", "internlm", "deepseek-llm", "chatml-internlm2", "chatml-smollm2"])
@pytest.mark.parametrize("reply", ["Hello", "\nHe", "？"])
def test_text_between_special_tokens_is_tokenised_in_one_call(name, reply):
    chat_format = CHAT_FORMATS[name]
    tokenizer = bpe_tokenizer(chat_format)
    messages = talk(chat_format, ["Hi", reply])
    whole = chat_format.encode(tokenizer, messages)
    assert whole.ids == tokenizer.encode(chat_format.render_text(messages), allow_special=True)
    reply_bytes = tokenizer.decode_bytes(label for label in whole.labels if label != IGNORED)
    assert reply_bytes.lstrip(b": \n").startswith(reply.strip().encode())


def test_qwen_tokenises_role_line_break_and_content_apart():
    chat_format = CHAT_FORMATS["chatml-qwen"]
    tokenizer = bpe_tokenizer(chat_format)
    ids = chat_format.encode(tokenizer, [{"role": "user", "content": "\nHi"}]).ids
    joined = tokenizer.encode(chat_format.render_text([{"role": "user", "content": "\nHi"}]), allow_special=True)
    assert tokenizer.decode(ids) == tokenizer.decode(joined)
    assert tokenizer.encode("\n\n") == [256] and 256 in joined and 256 not in ids


@all_formats
def test_stop_ids_and_sampling_are_usable(chat_format):
    tokenizer = TOKENIZERS[chat_format.name]
    ids = chat_format.stop_ids(tokenizer)
    assert ids == tuple(tokenizer.special_tokens[token.text] for token in chat_format.stop_tokens) and ids
    sampling = chat_format.sampling
    assert 0 < sampling.temperature <= 1 and sampling.repetition_penalty >= 1
    assert 0 < sampling.reply_limit(100) <= 8092
    assert sampling.max_length is None or sampling.reply_limit(sampling.max_length + 1) == 0


def test_history_is_dropped_from_the_oldest_round_that_does_not_fit():
    chat_format, tokenizer = CHAT_FORMATS["chatml-qwen"], TOKENIZERS["chatml-qwen"]
    system = {"role": "system", "content": "S"}
    rounds = [
        [{"role": "user", "content": f"q{k}" * 5}, {"role": "assistant", "content": f"a{k}" * 5}] for k in range(4)
    ]
    question = {"role": "user", "content": "last " * 100}
    messages = [system, *chain(*rounds), question]
    sizes = [len(chat_format.encode(tokenizer, [system, *chain(*rounds[-n:])]).ids) for n in (1, 2)]
    for budget, kept in ((0, 0), (sizes[0] - 1, 0), (sizes[0], 1), (sizes[1] - 1, 1), (sizes[1], 2), (10**6, 4)):
        expected = [system, *chain(*rounds[4 - kept :]), question]
        assert chat_format.drop_history(tokenizer, messages, max_tokens=budget) == expected
    assert chat_format.history_window == 6144
    # Qwen counts without the last line break, and keeps what is strictly less than the window.
    text = chat_format.render_text([system, *rounds[-1]]).removesuffix("\n")
    qwen_count = len(tokenizer.encode(text, allow_special=True))
    assert sizes[0] == qwen_count + 1


def test_a_tokenizer_without_a_special_token_is_refused():
    lacking = CharacterTokenizer({"<|im_start|>": 1})
    message = [{"role": "user", "content": "x"}]
    with pytest.raises(InputError, match=r"chat format chatml-qwen: the tokenizer has no special token '<\|im_end\|>'"):
        CHAT_FORMATS["chatml-qwen"].encode(lacking, message)
    with pytest.raises(InputError, match="no special token"):
        CHAT_FORMATS["chatml-qwen"].stop_ids(lacking)
    lacking.vocab_size = 150
    with pytest.raises(
        InputError, match="chat format baichuan2: the tokenizer has 150 ids, expected the special token"
    ):
        CHAT_FORMATS["baichuan2"].encode(lacking, message)


@pytest.fixture(scope="module")
def goldens_file(goldens):
    with np.load(goldens / "chat_label_masks.npz", allow_pickle=False) as file:
        return dict(file)


def golden_messages(system=None):
    """Return the conversations of the goldens, whose file holds them as JSON."""
    first = [("user", "hi"), ("assistant", "yo!"), ("user", "a b"), ("assistant", "c")]
    conversations = [first, [("user", "q"), ("assistant", "long answer")]]
    head = [] if system is None else [{"role": "system", "content": system}]
    return [[*head, *({"role": r, "content": c} for r, c in conversation)] for conversation in conversations]


class GoldenTokenizer(CharacterTokenizer):
    """The character tokenizer of the goldens."""

    def __init__(self, special_tokens, offset):
        super().__init__(special_tokens)
        self._offset = offset

    def encode(self, text, *, allow_special=False):
        return [self._offset + ord(character) for character in text]


@pytest.mark.parametrize(
    ("labels", "key"), [("published", "qwen_labels_finetune_py"), ("assistant", "qwen_labels_strict_assistant_only")]
)
def test_qwen_labels_are_those_of_the_published_script(goldens_file, labels, key):
    specials = {"<|im_start|>": int(goldens_file["im_start"]), "<|im_end|>": int(goldens_file["im_end"])}
    for row, messages in enumerate(golden_messages(str(goldens_file["system"]))):
        tokens = CHAT_FORMATS["chatml-qwen"].encode(GoldenTokenizer(specials, 0), messages, labels=labels)
        length = int(goldens_file["qwen_attention_mask"][row].sum())
        assert tokens.ids == goldens_file["qwen_input_ids"][row, :length].tolist()
        assert tokens.labels == goldens_file[key][row, :length].tolist()


def test_baichuan2_labels_are_those_of_the_published_script(goldens_file):
    chat_format, tokenizer = CHAT_FORMATS["baichuan2"], GoldenTokenizer({}, 1000)
    for row, messages in enumerate(golden_messages()):
        tokens = chat_format.encode(tokenizer, messages, labels="published")
        length = int(goldens_file["baichuan2_attention_mask"][row].sum())
        assert tokens.ids == goldens_file["baichuan2_input_ids"][row, :length].tolist()
        assert tokens.labels == goldens_file["baichuan2_labels"][row, :length].tolist()
        # The script also teaches that a conversation may end before it begins; ours does not.
        ours = chat_format.encode(tokenizer, messages)
        assert ours.ids == tokens.ids
        assert ours.labels == [IGNORED, *tokens.labels[1:]] and tokens.labels[0] == 2


def test_glm_labels_are_those_of_the_published_scripts():
    def learned(name, messages, labels):
        tokenizer = TOKENIZERS[name]
        tokens = CHAT_FORMATS[name].encode(tokenizer, messages, labels=labels)
        return "".join(tokenizer.decode([label]) if label != IGNORED else "." for label in tokens.labels)

    one, two = golden_messages()[1], golden_messages()[0]
    assert learned("chatglm", one, "published") == "..<sop>long answer<eop>"
    assert learned("chatglm", one, "assistant") == "...long answer<eop>"
    assert learned("chatglm2", one, "published") == learned("chatglm2", one, "assistant")
    assert learned("chatglm2", one, "published").lstrip(".") == "long answer</s>"
    for labels in ("published", "assistant"):
        assert learned("chatglm3", two, labels) == "." * 7 + "\nyo!<|user|>" + "." * 5 + "\nc</s>"
        assert learned("glm4", two, labels) == "." * 7 + "\nyo!<|user|>" + "." * 5 + "\nc<|user|>"
    # ChatGLM3's script trains on results of tools as well, GLM-4's does not.
    calls = tool_talk()
    assert "celsius" in learned("chatglm3", calls, "published")
    assert learned("glm4", calls, "published") == learned("glm4", calls, "assistant")
    assert learned("chatglm3", two[:3], "published").endswith("." * 5)


def test_only_families_with_a_script_have_published_labels():
    has = {name for name, chat_format in CHAT_FORMATS.items() if chat_format.has_published_labels}
    assert has == {"chatml-qwen", "baichuan2", "chatglm", "chatglm2", "chatglm3", "glm4"}
    for name, labels in (("llama2", "published"), ("chatml-qwen", "strict")):
        with pytest.raises(InputError, match="labels: "):
            CHAT_FORMATS[name].segments([{"role": "user", "content": "x"}], labels=labels)


def asset_folder(name):
    assets = Path(os.environ.get("JAXLLM_ASSETS") or pytest.skip(f"JAXLLM_ASSETS names no folder with {name}"))
    if not (assets / name).is_dir():
        pytest.skip(f"{assets}, the folder that JAXLLM_ASSETS names, holds no folder {name}")
    return assets / name


# From the tests of chatglm.cpp: the ids of a first question.
@pytest.mark.parametrize(
    ("name", "folder", "expected"),
    [
        ("chatglm", "chatglm-6b", [5, 74874, 130001, 130004]),
        ("chatglm3", "chatglm3-6b", [64790, 64792, 64795, 30910, 13, 36474, 54591, 64796]),
        ("glm4", "glm-4-9b-chat", [151331, 151333, 151336, 198, 109377, 151337]),
    ],
)
def test_real_ids_of_glm(name, folder, expected):
    tokenizer = load_tokenizer(asset_folder(folder))
    messages = [{"role": "user", "content": "你好"}]
    assert CHAT_FORMATS[name].encode(tokenizer, messages, add_generation_prompt=True).ids == expected


def test_real_ids_of_qwen(tmp_path):
    (tmp_path / QWEN_FILE).write_bytes(read_asset(QWEN_FILE))
    qwen = load_tokenizer(tmp_path)
    chat_format = CHAT_FORMATS["chatml-qwen"]
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "Hi<|im_end|>"}]
    tokens = chat_format.encode(qwen, messages)
    im_start, im_end, line = 151644, 151645, 198
    system = [im_start, 8948, line, 2610, 525, 264, 10950, 17847, 13, im_end, line]
    assert tokens.ids[:11] == system
    assert tokens.ids[11:18] == [im_start, 872, line, 108386, im_end, line, im_start]
    assert tokens.ids[18:20] == [77091, line] and tokens.ids[-2:] == [im_end, line]
    assert tokens.ids.count(im_end) == 3 and tokens.labels[-2:] == [im_end, IGNORED]
    assert chat_format.stop_ids(qwen) == (151643, im_end, im_start)
    assert qwen.encode("Observation:") == [37763, 367, 25]


def test_formats_are_data():
    changed = dataclasses.replace(CHAT_FORMATS["chatml-qwen"], name="mine", history_window=None)
    messages = [{"role": "user", "content": "x"}]
    assert changed.render_text(messages) == CHAT_FORMATS["chatml-qwen"].render_text(messages)
    assert all(name == chat_format.name for name, chat_format in CHAT_FORMATS.items())
