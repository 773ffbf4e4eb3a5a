"""Example sets: rows of conversations, pairs or prompts, tokenised once and kept beside the token shards."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path

import numpy as np

from jaxllm.config.schema import SourceConfig
from jaxllm.data.example_files import FORMAT, VERSION, ExampleIndex, ExampleWriter, check_examples
from jaxllm.data.examples import Encoder, Tokens, TooLong, fit, read_examples
from jaxllm.data.index_files import INDEX, from_json, open_array, read_json, write_json
from jaxllm.data.rows import Prompt, Purpose, read_row
from jaxllm.data.shards import Progress, cache_key, find_cached
from jaxllm.data.sources import BadRows, find_files
from jaxllm.errors import InputError
from jaxllm.files import OutputExistsError, new_folder

_WHAT = "a folder of examples"


class ExampleSet:
    """Read-only view of an example set; conversations, pairs and prompts are numbered from 0."""

    def __init__(
        self,
        folder: Path,
        index: ExampleIndex,
        tokens: np.ndarray,
        examples: np.ndarray,
        margins: np.ndarray,
        rows: np.ndarray,
    ):
        self.folder = folder
        self.index = index
        self.margins = margins
        self._tokens = tokens
        self._examples = examples
        self._rows = rows

    @classmethod
    def open(cls, folder: str | os.PathLike) -> ExampleSet:
        """Map the files of a folder into memory; raises InputError when one is missing, damaged or of another form."""
        folder = Path(folder).expanduser()
        fields = read_json(folder / INDEX, FORMAT, VERSION, _WHAT)
        index = from_json(ExampleIndex, fields, str(folder / INDEX))
        num_pairs = index.num_examples // 2 if index.purpose == "preference" else 0
        tokens = open_array(folder / "tokens.npy", "int32", (index.num_tokens, 2))
        examples = open_array(folder / "examples.npy", "int64", (index.num_examples, 4))
        margins = open_array(folder / "margins.npy", "float32", (num_pairs, 2))
        rows = open_array(folder / "rows.npy", "uint8", (index.num_row_bytes,))
        check_examples(folder / "examples.npy", examples, index)
        return cls(folder, index, tokens, examples, margins, rows)

    def __len__(self) -> int:
        return self.index.num_examples // self.examples_each

    @property
    def purpose(self) -> Purpose:
        """What the examples are for."""
        return self.index.purpose

    @property
    def examples_each(self) -> int:
        """Examples of one number: 2 for pairs, else 1."""
        return 2 if self.purpose == "preference" else 1

    def size(self) -> dict[str, int]:
        """Return what tells these examples from others."""
        return {name: getattr(self.index, name) for name in ("num_examples", "num_tokens", "num_trained")}

    def tokens(self, number: int) -> list[Tokens]:
        """Return the ids and labels of a conversation, of a prompt, or of a chosen and a rejected answer."""
        first = number * self.examples_each
        ends = [self._end(example) for example in range(first - 1, first + self.examples_each)]
        return [Tokens(*self._tokens[begin:end].T) for begin, end in itertools.pairwise(ends)]

    def lengths(self) -> np.ndarray:
        """Return the number of ids of each example, int64 [examples]."""
        return np.diff(self._examples[:, 0], prepend=0)

    def origin(self, number: int) -> str:
        """Say where a number came from: "file:line"."""
        _, source, line, _ = self._examples[number * self.examples_each]
        return f"{self.index.sources[source]}:{line}"

    def prompt(self, number: int) -> Prompt:
        """Return a prompt with its row, to which "_origin" is added: "file:line"."""
        kept = json.loads(self._rows[self._end(number - 1, 3) : self._end(number, 3)].tobytes())
        prompt = read_row(kept["row"], "prompt", system=kept["system"])
        return prompt._replace(row=prompt.row | {"_origin": self.origin(number)})

    def _end(self, example: int, column: int = 0) -> int:
        return int(self._examples[example, column]) if example >= 0 else 0

    def summary(self) -> str:
        """Say how much there is and what was left out."""
        index = self.index
        unit = {"sft": "examples", "preference": "pairs", "prompt": "prompts"}[self.purpose]
        parts = [f"{len(self):,} {unit}, {index.num_tokens:,} tokens"]
        if self.purpose != "prompt":
            parts[0] += f" ({index.num_trained / index.num_tokens:.1%} trained)"
        for count, what in (
            (index.left_out, "too long and left out"),
            (index.cut, "too long and cut"),
            (index.bad_rows, "bad rows skipped"),
        ):
            parts += [f"{count:,} {what}"] if count else []
        return ", ".join(parts)


def prepare_examples(
    source: SourceConfig,
    purpose: Purpose,
    encoder: Encoder,
    cache_dir: str | os.PathLike,
    *,
    seq_len: int,
    too_long: TooLong = "refuse",
    max_bad_rows: int = 0,
    progress: Progress | None = None,
    scratch: Path | None = None,
) -> ExampleSet:
    """Open a source as examples, tokenising it the first time; see `shards.prepare_source`.

    Args:
      purpose: what the rows are for.
      encoder: with which tokenizer, chat format and options.
      seq_len: most tokens of a conversation, of both answers of a pair with their prompts, or of a prompt. Texts are
        cut into pieces of so many, without losing a prediction.
      too_long: what becomes of rows with more; "truncate" cuts the end of conversations.
      max_bad_rows: rows that may be skipped before the source is refused.
      progress: called after each row with the examples and tokens written so far.
      scratch: where a copy that `cache_dir` does not have yet is made in its place.

    Raises:
      InputError: the source is bad; "truncate" for pairs and prompts, of which only the prompt could be cut.
    """
    if too_long == "truncate" and purpose != "sft":
        raise InputError(
            f"data.too_long: found 'truncate', expected 'refuse' or 'skip': no part of a {purpose} row can be cut"
        )
    if seq_len < 2:
        raise InputError(f"data.seq_len: leaves {seq_len} tokens for each of the {purpose} rows, expected at least 2")
    if encoder.chat is not None:
        encoder.chat.stop_ids(encoder.tokenizer)
    how = (FORMAT, VERSION, purpose, *encoder.identity(), source.rows, source.system, seq_len, too_long)
    cached = find_cached(cache_dir, cache_key(source, encoder.tokenizer, *how), scratch)
    with contextlib.suppress(OutputExistsError):
        _write(source, purpose, encoder, cached, seq_len, too_long, BadRows(max_bad_rows), progress)
    found = ExampleSet.open(cached)
    # The copy may stem from a run that allowed more.
    BadRows(max_bad_rows, found.index.bad_rows, found.index.bad_row_examples).check()
    return found


def _write(
    source: SourceConfig,
    purpose: Purpose,
    encoder: Encoder,
    output: Path,
    seq_len: int,
    too_long: TooLong,
    bad_rows: BadRows,
    progress: Progress | None,
) -> None:
    files = find_files(source.path, source.format)
    with new_folder(output.absolute()) as folder, ExampleWriter(folder) as writer:
        left_out = cut = 0
        for number, (file, format) in enumerate(files):
            for row in read_examples(file, format, source, purpose, bad_rows):
                with bad_rows.from_errors(f"{file}:{row.line}"):
                    encoded = encoder.encode(row.example, seq_len)
                    fitting = fit(encoded, row.example, seq_len, too_long)
                    left_out += not fitting
                    cut += bool(fitting) and fitting is not encoded
                    writer.add(fitting, row.example, number, row.line, source.system)
                if progress:
                    progress(writer.num_examples, writer.num_tokens)
        if not writer.num_examples:
            raise InputError(f"{source.path}: no examples; {left_out} too long; {bad_rows.summary()}")
        writer.finish()
        index = ExampleIndex(
            purpose=purpose,
            num_examples=writer.num_examples,
            num_tokens=writer.num_tokens,
            num_trained=writer.num_trained,
            num_row_bytes=writer.num_row_bytes,
            tokenizer=encoder.tokenizer.fingerprint,
            sources=[str(file) for file, _ in files],
            left_out=left_out,
            cut=cut,
            bad_rows=bad_rows.count,
            bad_row_examples=bad_rows.examples,
        )
        write_json(folder / INDEX, FORMAT, VERSION, index)
