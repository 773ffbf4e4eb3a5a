"""Encoding rows: what is trained, in every chat format and without one."""

import numpy as np
import pytest

from jaxllm.data.examples import Places, Tokens, fit
from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.data.rows import Dialogue, Pair, Prompt, Text, read_row
from jaxllm.errors import InputError
from jaxllm.families import spec as published_spec
from jaxllm.tokenizers.chat import CHAT_FORMATS, IGNORED
from tests.data.chats import CODE, WEATHER, code_talk, make_encoder, talk, tool_talk

all_formats = pytest.mark.parametrize("name", CHAT_FORMATS)
TOOL_FORMATS = [name for name, f in CHAT_FORMATS.items() if "function" in f.rules.tool_types]
CODE_FORMATS = [name for name, f in CHAT_FORMATS.items() if "code_interpreter" in f.rules.tool_types]


def taught(encoder, tokens):
    """Return the text that an example teaches; nothing comes before its first id."""
    return encoder.tokenizer.decode(tokens.labels[1:][tokens.labels[1:] != IGNORED].tolist())


def place_of(tokens, encoder, text):
    """Return where a text begins, in ids."""
    ids = encoder.tokenizer.encode(text)
    return next(k for k in range(len(tokens.ids)) if tokens.ids[k : k + len(ids)].tolist() == ids)


@all_formats
def test_the_end_of_a_reply_is_taught(name):
    encoder = make_encoder(name)
    tokens = encoder.dialogue(Dialogue(talk("q1", "Yes!", "q2", "No!")))
    assert np.isin(tokens.labels[-2:], encoder.stop_ids()).any()
    assert "No!" in taught(encoder, tokens)
    assert not {"q1", "q2"} & {taught(encoder, tokens)[k : k + 2] for k in range(len(tokens.labels))}


@all_formats
def test_a_pair_teaches_its_answers_and_ends_with_what_ends_them(name):
    encoder = make_encoder(name)
    pair = Pair(talk("q1", "Yes!", "q2"), talk("", "No!")[1:], talk("", "Never!")[1:])
    for tokens, answer in zip(encoder.pair(pair), ("No!", "Never!"), strict=True):
        assert tokens.labels[-1] == tokens.ids[-1] and tokens.ids[-1] in encoder.stop_ids()
        assert "Yes!" not in taught(encoder, tokens) and answer in taught(encoder, tokens)
        first = int(np.argmax(tokens.labels != IGNORED))
        assert (tokens.labels[first:] != IGNORED).all()


@all_formats
def test_a_prompt_is_the_beginning_of_its_answer(name):
    encoder = make_encoder(name)
    prompt = encoder.prompt(Prompt(talk("q1", "Yes!", "q2"), None, {}))
    whole = encoder.dialogue(Dialogue(talk("q1", "Yes!", "q2", "No!")))
    assert whole.ids[: len(prompt.ids)].tolist() == prompt.ids.tolist()
    assert prompt.num_trained == 0


@all_formats
def test_only_the_last_turn_may_be_taught(name):
    encoder, last = make_encoder(name), make_encoder(name, turns="last")
    conversation = Dialogue(talk("q1", "Yes!", "q2", "No!"))
    assert "Yes!" not in taught(last, last.dialogue(conversation)) and "No!" in taught(
        last, last.dialogue(conversation)
    )
    assert last.dialogue(conversation).ids.tolist() == encoder.dialogue(conversation).ids.tolist()
    unwanted = talk("q1", "Yes!", "q2", "No!")
    unwanted[3]["weight"] = 0
    if name not in ("chatglm", "chatglm2"):
        assert "Yes!" in taught(last, last.dialogue(Dialogue(unwanted)))


@pytest.mark.parametrize("name", TOOL_FORMATS)
def test_calls_are_taught_and_results_are_not(name):
    encoder = make_encoder(name)
    tokens = encoder.dialogue(Dialogue(tool_talk(), [WEATHER]))
    said = taught(encoder, tokens)
    assert "get_weather" in said and "Paris" in said and "It is mild" in said
    assert "celsius" not in said and "Weather of a city" not in said
    result = place_of(tokens, encoder, "celsius")
    assert set(tokens.labels[result : result + len("celsius")].tolist()) == {IGNORED}


@pytest.mark.parametrize("name", CODE_FORMATS)
def test_code_is_taught_and_its_output_is_not(name):
    encoder = make_encoder(name)
    said = taught(encoder, encoder.dialogue(Dialogue(code_talk(), [CODE])))
    assert "print(6 * 7)" in said and "Forty-two" in said and "42" not in said


def test_react_teaches_thoughts_and_actions_up_to_the_observation():
    encoder = make_encoder("react-qwen")
    said = taught(encoder, encoder.dialogue(Dialogue(tool_talk(), [WEATHER])))
    assert said.startswith("Thought: Let me see\nAction: get_weather\nAction Input: ")
    assert said.index("\nObservation:") < said.index("Final Answer: It is mild<|im_end|>")


def test_a_reply_without_weight_in_a_format_of_last_replies_teaches_nothing():
    encoder = make_encoder("chatglm2")
    conversation = talk("q1", "Yes!", "q2", "No!")
    conversation[3]["weight"] = 0
    with pytest.raises(InputError, match="nothing is trained: the chat format chatglm2 trains the last reply only"):
        encoder.encode(Dialogue(conversation), 100)


def test_without_a_format_a_prompt_and_its_answer_are_plain_text():
    encoder = make_encoder(None)
    end = encoder.tokenizer.eos_id
    tokens = encoder.dialogue(Dialogue(talk("1+1=", "2")))
    assert tokens.ids.tolist() == [*b"1+1=", *b"2", end]
    assert tokens.labels.tolist() == [IGNORED] * 4 + [*b"2", end]
    assert encoder.stop_ids() == (end,)
    for conversation in (Dialogue(talk("a", "b", "c", "d")), Dialogue(talk("a", "b"), [WEATHER])):
        with pytest.raises(InputError, match="more than a prompt and an answer; that needs a chat format"):
            encoder.dialogue(conversation)


@pytest.mark.parametrize("size", ["glm-10b", "glm-130b"])
def test_without_a_format_glm_fills_its_mask(size):
    encoder = make_encoder(None)
    ids = PrefixIds(mask=300, gmask=301, smask=302, sop=303, eop=304)
    places = Places(published_spec(size), ids)
    encoder = type(encoder)(tokenizer=encoder.tokenizer, chat=None, options=encoder.options, places=places)
    tokens = encoder.dialogue(Dialogue(talk("ab", "cd")))
    assert tokens.ids.tolist() == [*b"ab", 301, 303, *b"cd", 304]
    assert tokens.labels[4:].tolist() == [*b"cd", 304]
    assert places.of(tokens.ids)["prefix_mask"].tolist() == [True] * 3 + [False] * 4
    with pytest.raises(InputError, match="the model has no positions for texts without a prompt"):
        encoder.encode(Text("abc"), 10)


def test_rows_beyond_a_table_of_positions_are_refused():
    ids = PrefixIds(mask=300, gmask=301, smask=302, sop=303, eop=304)
    with pytest.raises(InputError, match="the model has 0 to 1024"):
        Places(published_spec("glm-10b"), ids).of(np.array([*[65] * 1100, 301, 303, 304]))


@pytest.mark.parametrize("seq_len", [2, 3, 5, 100])
def test_texts_are_cut_without_losing_a_prediction(seq_len):
    encoder = make_encoder()
    pieces = encoder.encode(Text("a longer text"), seq_len)
    end = encoder.tokenizer.eos_id
    assert np.concatenate([piece.labels[1:] for piece in pieces]).tolist() == [*b"a longer text", end]
    assert np.concatenate([piece.ids[:-1] for piece in pieces]).tolist() == [end, *b"a longer text"]
    assert all(2 <= len(piece.ids) <= seq_len and piece.labels[0] == IGNORED for piece in pieces)


def test_what_is_too_long_is_refused_left_out_or_cut():
    tokens = Tokens(np.arange(9, dtype=np.int32), np.array([IGNORED] * 4 + [4, 5, 6, 7, 8], np.int32))
    row = Dialogue([])
    assert fit([tokens], row, 9, "refuse") == [tokens]
    with pytest.raises(InputError, match=r"found 9 tokens, expected at most 8; data\.seq_len gives more room"):
        fit([tokens], row, 8, "refuse")
    assert fit([tokens], row, 8, "skip") == []
    (cut,) = fit([tokens], row, 5, "truncate")
    assert (cut.ids.tolist(), cut.num_trained) == ([0, 1, 2, 3, 4], 1)
    with pytest.raises(InputError, match="nothing that is trained is left of 9 tokens when they are cut to 4"):
        fit([tokens], row, 4, "truncate")


def test_both_answers_of_a_pair_share_a_row():
    answers = [Tokens(np.zeros(5, np.int32), np.zeros(5, np.int32))] * 2
    pair = Pair([], [], [])
    assert fit(answers, pair, 10, "refuse") == answers
    assert fit(answers, pair, 9, "skip") == []


def test_answers_of_the_same_tokens_are_refused():
    encoder = make_encoder("llama2")
    row = read_row({"prompt": "q", "chosen": "a", "rejected": " a "}, "preference")
    with pytest.raises(InputError, match="chosen and rejected: found the same tokens twice"):
        encoder.pair(row)
