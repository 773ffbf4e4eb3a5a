"""Conversations with a model: what it is asked, where its reply ends, and the command line."""

import dataclasses
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cli import main
from jaxllm.errors import InputError
from jaxllm.generate.text import _until
from jaxllm.language_model import LanguageModel
from jaxllm.tokenizers.chat import CHAT_FORMATS
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE
from tests.tiny_models import LLAMA, random_params

QUESTION = [{"role": "user", "content": "to be?"}]


@pytest.fixture(scope="module")
def lm():
    specials = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    tokens = [bytes([value]) for value in range(256)]
    tokenizer = TiktokenBPE(
        tokens, pattern=r"(?s).", special_tokens=specials, normalization=None, eos_token="<|endoftext|>"
    )
    spec = dataclasses.replace(LLAMA, vocab_size=259, max_position_embeddings=256)
    return LanguageModel(spec, random_params(spec), tokenizer=tokenizer)


def test_a_reply_is_what_the_model_says_after_the_formatted_conversation(lm):
    chat_format = CHAT_FORMATS["chatml"]
    prompt = chat_format.encode(lm.tokenizer, QUESTION, add_generation_prompt=True).ids
    stops = chat_format.stop_ids(lm.tokenizer)
    ids = lm.generate([prompt], max_new_tokens=12, eos_ids=[*stops, lm.tokenizer.eos_id])[0]
    said = [int(token) for token in ids if token not in (*stops, lm.tokenizer.eos_id)]
    reply = lm.chat(QUESTION, temperature=0, max_new_tokens=12)
    assert reply == {"role": "assistant", "content": lm.tokenizer.decode(said)}
    assert "".join(lm.stream_chat(QUESTION, temperature=0, max_new_tokens=12)) == reply["content"]


def test_sampling_is_the_formats_own_unless_chosen(lm):
    assert lm.chat(QUESTION, max_new_tokens=12, seed=1) == lm.chat(QUESTION, max_new_tokens=12, seed=1)
    assert lm.chat(QUESTION, max_new_tokens=12, seed=1) != lm.chat(QUESTION, max_new_tokens=12, seed=2)


def test_conversations_that_cannot_be_are_refused(lm):
    with pytest.raises(InputError, match="chat format 'alpaca': expected one of chatml-qwen"):
        lm.chat(QUESTION, chat_format="alpaca")
    with pytest.raises(InputError, match="the model has 256 positions"):
        lm.chat([{"role": "user", "content": "to be " * 200}])
    silent = LanguageModel(lm.spec, lm.params)
    with pytest.raises(InputError, match="without a tokenizer"):
        silent.chat(QUESTION)


@given(
    pieces=st.lists(st.text("abO:", max_size=4), max_size=12),
    stops=st.lists(st.text("abO:", min_size=1, max_size=3), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(pieces, stops):
    text = "".join(pieces)
    found = "".join(_until(iter(pieces), stops))
    starts = [text.find(stop) for stop in stops if stop in text]
    assert text.startswith(found)
    assert not any(stop in found for stop in stops)
    if not starts:
        assert found == text
    else:
        # Where two stop strings overlap, the one that is complete first counts.
        assert min(starts) <= len(found) < min(text.find(stop) + len(stop) for stop in stops if stop in text)


def test_the_command_line_holds_a_conversation(lm, tmp_path, capsys, monkeypatch):
    lm.save_pretrained(tmp_path / "model")
    arguments = ["chat", str(tmp_path / "model"), "--temperature", "0", "--max-new-tokens", "6"]
    assert main([*arguments, "--message", "to be?", "--message", "or not?"]) == 0
    shown = capsys.readouterr().out
    first = lm.chat(QUESTION, temperature=0, max_new_tokens=6)
    messages = [*QUESTION, first, {"role": "user", "content": "or not?"}]
    second = lm.chat(messages, temperature=0, max_new_tokens=6)
    assert shown == f">>> to be?\n{first['content']}\n>>> or not?\n{second['content']}\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("or not?\n/new\nto be?\n"))
    assert main(arguments) == 0
    assert capsys.readouterr().out.endswith(f"{first['content']}\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "expected a JSON list of objects"), ("[", "not valid JSON"), (None, "cannot read the tools")],
)
def test_faulty_tools_are_refused(tmp_path, capsys, content, message):
    tools = tmp_path / "tools.json"
    if content is not None:
        tools.write_text(content)
    assert main(["chat", "nowhere", "--tools", str(tools), "--message", "hi"]) == 2
    assert message in capsys.readouterr().err


def test_every_family_names_formats_and_tokenizers_that_exist():
    from jaxllm.families import FAMILIES
    from jaxllm.tokenizers.published import PUBLISHED

    for family in FAMILIES:
        for size in family.sizes.values():
            config = {"vocab_size": size.vocab_size, "hidden_size": size.hidden_size, "seq_length": 8192}
            for tokens in ((), ("<|im_start|>", "<reponame>"), ("<|user|>",)):
                assert family.chat(config, tokens) in {None, *CHAT_FORMATS}
            assert family.tokenizer(config) in {None, *PUBLISHED}
