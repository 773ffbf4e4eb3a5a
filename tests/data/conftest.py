"""A byte tokenizer, and shard sets made from texts or from ids."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from jaxllm.data.shard_files import Shard, ShardIndex
from jaxllm.data.shards import ShardSet
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE


@pytest.fixture(scope="session")
def byte_tokenizer() -> Callable[[int], Tokenizer]:
    """Build a tokenizer with an id for each byte, then for `num_pairs` pairs of bytes, then the end of text."""

    def build(num_pairs: int = 0) -> Tokenizer:
        tokens = [bytes([byte]) for byte in range(256)]
        tokens += [bytes(pair) for pair in itertools.islice(itertools.product(range(256), repeat=2), num_pairs)]
        return TiktokenBPE(
            {token: rank for rank, token in enumerate(tokens)},
            pattern=r"[\s\S]",
            special_tokens={"<|endoftext|>": len(tokens)},
            normalization=None,
            eos_token="<|endoftext|>",
        )

    return build


@pytest.fixture
def tokenizer(byte_tokenizer) -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def shards_of() -> Callable[..., ShardSet]:
    """Build a shard set in memory from lists of ids, two documents to a shard."""

    def build(documents: Sequence[Sequence[int]], name: str = "memory", vocab_size: int = 1000) -> ShardSet:
        groups = [documents[i : i + 2] for i in range(0, len(documents), 2)]
        tokens = [np.array(list(itertools.chain(*group)), np.uint16) for group in groups]
        lines = itertools.count(1)
        rows = [
            np.array([[end, 0, next(lines)] for end in itertools.accumulate(map(len, group))], np.int64)
            for group in groups
        ]
        index = ShardIndex(
            dtype="uint16",
            vocab_size=vocab_size,
            tokenizer="none",
            num_documents=len(documents),
            num_tokens=sum(map(len, documents)),
            num_bytes=sum(map(len, documents)),
            sources=[f"{name}.jsonl"],
            bad_rows=0,
            bad_row_examples=[],
            shards=[Shard("", "", len(ids), len(ends)) for ids, ends in zip(tokens, rows, strict=True)],
        )
        return ShardSet(Path(name), index, tokens, rows)

    return build
