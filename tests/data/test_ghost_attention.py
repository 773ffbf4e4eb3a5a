"""Ghost Attention: what is sampled, and what the row keeps of it."""

import json
import random

import pytest

from jaxllm.data.ghost_attention import (
    Constraint,
    Instruction,
    combine_constraints,
    ghost_row,
    ghost_rows,
    read_constraints,
)
from jaxllm.data.rows import read_row
from jaxllm.errors import InputError
from tests.data.chats import make_encoder, talk

HOBBY = Constraint("hobby", "You enjoy {}.", "Hobby: {}", ("tennis", "chess"))
LANGUAGE = Constraint("language", "Always answer in {}.", "Language: {}", ("French", "Latin", "Thai"))
FIGURE = Constraint("figure", "Always act as {}.", "Figure: {}", ("Napoleon",))


class Sampler:
    """Records what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, messages):
        self.asked.append(messages)
        return f"reply {len(self.asked)}"


def test_the_instruction_is_sampled_with_on_every_turn_and_written_on_the_first():
    sample = Sampler()
    system = {"role": "system", "content": "S"}
    row = ghost_row([system, *talk("a", "old", "b", "old", "c")], Instruction("Act as X.", "Figure: X"), sample)
    assert [m["content"] for m in sample.asked[2]] == [
        *("S", "Act as X.\na", "reply 1", "Act as X.\nb", "reply 2", "Act as X.\nc"),
    ]
    assert row["messages"] == [
        system,
        {"role": "user", "content": "Figure: X\na"},
        {"role": "assistant", "content": "reply 1", "weight": 0},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "reply 2", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "reply 3"},
    ]


def test_only_the_last_reply_is_trained():
    row = ghost_row(talk("a", "", "b"), Instruction("I", "I"), Sampler())
    encoder = make_encoder()
    tokens = encoder.dialogue(read_row(row, "messages"))
    assert encoder.tokenizer.decode(tokens.labels[tokens.labels >= 0].tolist()) == "reply 2<|im_end|>"


def test_constraints_are_combined_at_random_and_said_in_brief_half_of_the_time():
    drawn = [combine_constraints([HOBBY, LANGUAGE, FIGURE], random.Random(seed)) for seed in range(300)]
    counts = [sum(word in found.sampled for word in ("enjoy", "answer", "act")) for found in drawn]
    assert set(counts) == {1, 2, 3}
    assert {value for found in drawn for value in LANGUAGE.values if value in found.sampled} == set(LANGUAGE.values)
    brief = [found for found in drawn if found.written != found.sampled]
    assert 100 < len(brief) < 200 and all(":" in found.written for found in brief)


def test_a_row_depends_on_the_seed_and_its_number_alone():
    conversations = [talk("a", "x", "b", "y"), talk("c", "z"), talk("d", "w")]

    def rows(seed):
        return list(ghost_rows(conversations, [HOBBY, LANGUAGE], lambda messages: "r", seed=seed))

    assert rows(1) == rows(1) != rows(2)
    assert list(ghost_rows(conversations[:1], [HOBBY, LANGUAGE], lambda messages: "r", seed=1)) == rows(1)[:1]


@pytest.mark.parametrize(
    ("messages", "reply", "problem"),
    [
        ([{"role": "tool", "content": "x"}], "r", "found a message of the role 'tool', expected user and assistant"),
        ([{"role": "system", "content": "x"}], "r", "found no question"),
        (talk("a"), " ", "the reply to question 0 is empty"),
    ],
)
def test_what_makes_no_row_is_refused(messages, reply, problem):
    with pytest.raises(InputError, match=problem):
        ghost_row(messages, Instruction("I", "I"), lambda asked: reply)


def test_constraints_are_read_from_a_file(tmp_path):
    path = tmp_path / "constraints.json"
    path.write_text(json.dumps([HOBBY._asdict(), LANGUAGE._asdict()]))
    assert read_constraints(path) == [HOBBY, LANGUAGE]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[", "not valid JSON"),
        ("[]", "expected a list of constraints"),
        (
            '[{"name": "x"}]',
            r"\[0\]: found \['name'\], expected an object of the fields name, instruction, short, values",
        ),
        (json.dumps([HOBBY._asdict() | {"short": "x"}]), r"\[0\]\.short: found 'x', expected a text with \{\}"),
        (json.dumps([HOBBY._asdict() | {"values": []}]), r"\[0\]\.values: found \[\], expected a list of texts"),
    ],
)
def test_bad_constraints_are_refused(tmp_path, text, problem):
    path = tmp_path / "constraints.json"
    path.write_text(text)
    with pytest.raises(InputError, match=problem):
        read_constraints(path)
