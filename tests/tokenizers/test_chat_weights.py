"""Replies of weight 0: written as ever, but neither they nor the token that ends them are trained on."""

import pytest
from test_chat import CODE, WEATHER, all_formats, character_tokenizer, code_talk, talk, tool_talk

from jaxllm.errors import InputError
from jaxllm.tokenizers.chat import CHAT_FORMATS, IGNORED

TRAINS_THE_LAST_REPLY_ONLY = ("chatglm", "chatglm2")


def encoded(chat_format, messages, tools=None, labels="assistant"):
    return chat_format.encode(character_tokenizer(chat_format), messages, tools, labels=labels)


def weighed(messages, *weights):
    """Give the replies weights, in their order."""
    weights = iter(weights)
    return [m | {"weight": next(weights)} if m["role"] == "assistant" else m for m in messages]


def label_kinds(chat_format):
    return ("assistant", "published") if chat_format.has_published_labels else ("assistant",)


@all_formats
def test_weight_1_is_the_default_and_weights_change_no_id(chat_format):
    for labels in label_kinds(chat_format):
        plain = encoded(chat_format, talk(chat_format), labels=labels)
        assert encoded(chat_format, weighed(talk(chat_format), 1, 1), labels=labels) == plain
        assert encoded(chat_format, weighed(talk(chat_format), 0, 1), labels=labels).ids == plain.ids


@all_formats
def test_what_both_replies_train_is_what_each_of_them_trains_alone(chat_format):
    for labels in label_kinds(chat_format):
        none, first, second, both = (
            encoded(chat_format, weighed(talk(chat_format), *weights), labels=labels).labels
            for weights in ((0, 0), (1, 0), (0, 1), (1, 1))
        )
        assert none != both
        for labels_of in zip(none, first, second, both, strict=True):
            alone = {label for label in labels_of[:3] if label != IGNORED}
            assert ({labels_of[3]} - {IGNORED}) == alone
        # Nothing but what stays anyway is trained by both.
        both_times = [IGNORED not in pair for pair in zip(first, second, strict=True)]
        assert both_times == [label != IGNORED for label in none]


@all_formats
def test_without_weight_nothing_of_a_reply_is_trained(chat_format):
    labels = encoded(chat_format, weighed(talk(chat_format), 0, 0)).labels
    assert set(labels) == {IGNORED}
    first = encoded(chat_format, weighed(talk(chat_format), 1, 0)).labels
    assert (set(first) == {IGNORED}) == (chat_format.name in TRAINS_THE_LAST_REPLY_ONLY)


def test_published_labels_keep_the_layout_of_a_reply_without_weight():
    qwen = CHAT_FORMATS["chatml-qwen"]
    tokenizer = character_tokenizer(qwen)
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    found = encoded(qwen, weighed(talk(qwen), 0, 1), labels="published")
    trained = [token for token, label in zip(found.ids, found.labels, strict=True) if label != IGNORED]
    # System, two questions and two replies: each start and line break, but the first reply's end is left out.
    assert (trained.count(start), trained.count(end)) == (5, 4)
    assert tokenizer.decode([token for token in trained if token > 1_000_000]).count("\n") == 5


@pytest.mark.parametrize("name", [name for name, f in CHAT_FORMATS.items() if "function" in f.rules.tool_types])
def test_a_call_has_the_weight_of_its_message(name):
    chat_format = CHAT_FORMATS[name]
    tokenizer = character_tokenizer(chat_format)
    found = encoded(chat_format, weighed(tool_talk(), 0, 1), [WEATHER])
    trained = tokenizer.decode([label for label in found.labels if label != IGNORED])
    assert "get_weather" not in trained and "22 度" in trained
    found = encoded(chat_format, weighed(tool_talk(), 1, 0), [WEATHER])
    trained = tokenizer.decode([label for label in found.labels if label != IGNORED])
    assert "get_weather" in trained and "22 度" not in trained and "celsius" not in trained


@pytest.mark.parametrize("name", [name for name, f in CHAT_FORMATS.items() if "code_interpreter" in f.rules.tool_types])
def test_code_has_the_weight_of_its_message(name):
    chat_format = CHAT_FORMATS[name]
    tokenizer = character_tokenizer(chat_format)
    found = encoded(chat_format, weighed(code_talk(), 0, 1), [CODE])
    trained = tokenizer.decode([label for label in found.labels if label != IGNORED])
    assert "print" not in trained and "1, 2" in trained


@pytest.mark.parametrize("weight", [2, 0.5, "1", True])
def test_other_weights_are_refused(weight):
    chat_format = CHAT_FORMATS["chatml"]
    with pytest.raises(InputError, match=r"messages\[2\]: weight: found .*, expected 0 or 1"):
        chat_format.segments(weighed(talk(chat_format), weight, 1))


def test_only_the_assistant_has_weights():
    with pytest.raises(InputError, match=r"messages\[0\]: weight: found in the user's message"):
        CHAT_FORMATS["chatml"].segments([{"role": "user", "content": "Hi", "weight": 1}])
