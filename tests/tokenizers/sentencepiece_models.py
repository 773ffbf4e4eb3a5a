"""Tiny sentencepiece models, trained on the spot."""

import io

import pytest

sentencepiece = pytest.importorskip("sentencepiece", reason="needs the package sentencepiece")

CORPUS = ["hello world, the quick brown fox", "你好，世界 hello there", "def main():\n    print(1234)"] * 20
SYMBOLS = ["<n>", "<eoh>", "<eoa>", *(f"<reserved_{k}>" for k in (102, 103, 106, 107))]
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def train(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        user_defined_symbols=SYMBOLS,
        **options,
    )
    return model.getvalue()


LLAMA = train(model_type="bpe", vocab_size=340, byte_fallback=True, **IDENTITY)
NO_DUMMY_PREFIX = train(model_type="bpe", vocab_size=340, byte_fallback=True, add_dummy_prefix=False, **IDENTITY)
# As icetk's: no bytes of its own, a pad token, a piece for the line break.
ICETK = train(model_type="unigram", vocab_size=60, bos_id=-1, pad_id=3, **IDENTITY)
NORMALIZING = train(model_type="unigram", vocab_size=60)
