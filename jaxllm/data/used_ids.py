"""Which token ids a text uses: what `jaxllm tokenizer slim --unused` keeps."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import numpy as np

from jaxllm.data.piece_counts import texts_of
from jaxllm.tokenizers import Tokenizer
from jaxllm.tokenizers.train import Progress


def used_ids(
    tokenizer: Tokenizer,
    paths: Sequence[str | PathLike[str]],
    *,
    text_key: str = "text",
    progress: Progress | None = None,
) -> list[int]:
    """Return the ids that occur in the documents of files, in ascending order.

    Args:
      paths: files, globs or folders that `jaxllm.data.sources` can read.
      text_key: name of the text field in jsonl and parquet rows.
      progress: called as `progress(documents read, ids found)`.

    Raises:
      InputError: a bad file or row.
    """
    is_used = np.zeros(tokenizer.vocab_size, bool)
    for number, text in enumerate(texts_of(paths, text_key), 1):
        is_used[tokenizer.encode_to_numpy(text)] = True
        if progress:
            progress(number, int(is_used.sum()))
    return np.flatnonzero(is_used).tolist()
