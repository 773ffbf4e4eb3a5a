"""Examples as token ids with labels, made from rows by a tokenizer and a chat format."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxllm.config.alignment import ChatConfig
from jaxllm.config.schema import SourceConfig
from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.data.rows import (
    Dialogue,
    Example,
    Message,
    Pair,
    Prompt,
    Purpose,
    Text,
    check_purpose,
    detect_kind,
    is_trained,
    purpose_of,
    read_row,
    without_weight,
)
from jaxllm.data.sources import BadRows, read_file, read_rows
from jaxllm.data.token_rows import check_positions, layout_of
from jaxllm.errors import InputError, located
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.chat import IGNORED, ChatFormat

TooLong = Literal["refuse", "skip", "truncate"]
Tools = Sequence[Mapping[str, Any]] | None


class ReadRow(NamedTuple):
    """One row: its line (from 1), its kind and what it holds."""

    line: int
    kind: str
    example: Example


class Tokens(NamedTuple):
    """One example: `ids` int32 [n], and `labels` int32 [n], what place t learns from those before it or IGNORED."""

    ids: np.ndarray
    labels: np.ndarray

    @property
    def num_trained(self) -> int:
        """Predictions that are trained; nothing comes before the first id."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclasses.dataclass(frozen=True)
class Places:
    """How a model counts the places of one example.

    Attributes:
      prefix_ids: special ids of a model whose prefix all tokens see.
    """

    spec: ModelSpec
    prefix_ids: PrefixIds | None = None

    def of(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Return the fields of a row that say where its slots stand, each [n]; those that the model has.

        Raises:
          InputError: ids [n] from which a prefix model's positions do not follow, or more than its table has.
        """
        layout = layout_of(self.spec, ids[None], np.ones((1, len(ids)), bool), self.prefix_ids)
        check_positions(self.spec, layout)
        return {name: field[0] for name, field in layout._asdict().items() if field is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns what rows hold into ids and labels.

    Attributes:
      chat: how conversations are written; None: a prompt as the tokenizer opens one, the answer, an end token.
      options: what of a conversation is trained.
      places: of the model, against which ids are checked; None where no model is known.
    """

    tokenizer: Tokenizer
    chat: ChatFormat | None
    options: ChatConfig
    places: Places | None

    def identity(self) -> list[Any]:
        """Return what decides how rows become ids and labels, but for the tokenizer, as JSON types."""
        prefix = self._prefix_ids
        return [
            None if self.chat is None else self.chat.name,
            dataclasses.asdict(self.options),
            None if prefix is None else dataclasses.asdict(prefix),
        ]

    def encode(self, example: Example, seq_len: int) -> list[Tokens]:
        """Encode what a row holds: a text as pieces of at most `seq_len` ids, a pair as its two answers.

        Raises:
          InputError: the chat format cannot express it, or nothing is trained.
        """
        match example:
            case Text():
                return list(self.text(example, seq_len))
            case Pair():
                return list(self.pair(example))
            case Prompt():
                return [self.prompt(example)]
        tokens = self.dialogue(example)
        if not tokens.num_trained:
            raise InputError(f"nothing is trained: the chat format {self.chat.name} trains the last reply only")
        return [tokens]

    def dialogue(self, dialogue: Dialogue) -> Tokens:
        """Encode a conversation; raises InputError where the chat format cannot express it."""
        messages = dialogue.messages
        if self.options.turns == "last":
            last = max(k for k, message in enumerate(messages) if is_trained(message))
            messages = [*without_weight(messages[:last]), *messages[last:]]
        return self._encode(messages, dialogue.tools, self.options.labels)

    def pair(self, pair: Pair) -> tuple[Tokens, Tokens]:
        """Encode both answers with their prompt, up to the token that ends them; only they are trained."""
        prompt = without_weight(pair.prompt)
        chosen, rejected = (
            up_to_end(self._encode([*prompt, *answer], pair.tools, "assistant"))
            for answer in (pair.chosen, pair.rejected)
        )
        if np.array_equal(chosen.ids, rejected.ids):
            raise InputError("chosen and rejected: found the same tokens twice, expected answers that differ")
        return chosen, rejected

    def scored(self, dialogue: Dialogue, *, end_id: int | None = None, finished: bool = True) -> Tokens:
        """Encode a conversation up to the token at which a reward model reads its score, which ends the last answer.

        Args:
          end_id: a token after whole conversations that is read instead; these have no system message but their own
            (get_score in the code of InternLM2's reward models).
          finished: False: the answer was cut off, so that nothing follows it, and its last token is read.

        Raises:
          InputError: the chat format cannot express it.
        """
        messages, answer = without_weight(dialogue.messages[:-1]), {**dialogue.messages[-1], "weight": 1}
        has_system = bool(messages) and messages[0]["role"] == "system"
        if end_id is not None and not has_system and self.chat is not None and self.chat.empty_system_is_none:
            messages = [{"role": "system", "content": ""}, *messages]
        tokens = self._encode([*messages, answer], dialogue.tools, "assistant")
        if end_id is None or not finished:
            tokens = up_to_end(tokens)
        if not finished and tokens.ids[-1] in self.stop_ids():
            tokens = Tokens(tokens.ids[:-1], tokens.labels[:-1])
        if end_id is None:
            return tokens
        return Tokens(*(np.append(part, np.int32(end_id)) for part in tokens))

    def prompt(self, prompt: Prompt) -> Tokens:
        """Encode a prompt up to where the assistant begins to speak."""
        if self.chat is None:
            ids = self._plain_prompt(prompt.messages, prompt.tools)
        else:
            ids = self.chat.encode(self.tokenizer, prompt.messages, prompt.tools, add_generation_prompt=True).ids
        return self._checked(ids, [IGNORED] * len(ids))

    def text(self, text: Text, seq_len: int) -> Iterator[Tokens]:
        """Encode a text as pieces of at most `seq_len` ids; each repeats the last id of the one before it."""
        if self.places is not None and self.places.spec.mask == "prefix":
            raise InputError("found a text; the model has no positions for texts without a prompt")
        start, end = self._boundaries()
        ids = np.array([start, *self.tokenizer.encode(text.text), end], np.int32)
        for begin in range(0, len(ids) - 1, seq_len - 1):
            piece = ids[begin : begin + seq_len]
            yield Tokens(piece, np.array([IGNORED, *piece[1:]], np.int32))

    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""
        return (self._boundaries()[1],) if self.chat is None else self.chat.stop_ids(self.tokenizer)

    @property
    def _prefix_ids(self) -> PrefixIds | None:
        return None if self.places is None else self.places.prefix_ids

    def _encode(self, messages: Sequence[Message], tools: Tools, labels: str) -> Tokens:
        if self.chat is not None:
            encoded = self.chat.encode(self.tokenizer, messages, tools, labels=labels)
            return self._checked(encoded.ids, encoded.labels)
        prompt = self._plain_prompt(messages[:-1], tools)
        answer = [*self.tokenizer.encode(messages[-1]["content"]), self._boundaries()[1]]
        return self._checked([*prompt, *answer], [IGNORED] * len(prompt) + answer)

    def _plain_prompt(self, messages: Sequence[Message], tools: Tools) -> list[int]:
        if tools or [message["role"] for message in messages] != ["user"]:
            raise InputError("found more than a prompt and an answer; that needs a chat format, see chat.format")
        ids = self.tokenizer.encode_prompt(messages[0]["content"])
        prefix = self._prefix_ids
        if prefix is None or prefix.sop in ids:
            return ids
        return [*ids, prefix.mask if prefix.gmask is None else prefix.gmask, prefix.sop]

    def _boundaries(self) -> tuple[int, int]:
        """Return (what opens a text, what ends a text or an answer)."""
        tokenizer, prefix = self.tokenizer, self._prefix_ids
        end = tokenizer.eos_id if prefix is None or prefix.eop is None else prefix.eop
        if end is None:
            raise InputError("the tokenizer has no end-of-text token (eos_token) to end an example with")
        return (end if tokenizer.bos_id is None else tokenizer.bos_id), end

    def _checked(self, ids: list[int], labels: list[int]) -> Tokens:
        tokens = Tokens(np.array(ids, np.int32), np.array(labels, np.int32))
        if self.places is not None:
            self.places.of(tokens.ids)
        return tokens


def read_examples(
    file: Path, format: str, source: SourceConfig, purpose: Purpose | None, bad_rows: BadRows
) -> Iterator[ReadRow]:
    """Yield the rows of one file, all of one kind, which is told from the first if the source does not say.

    Args:
      purpose: what rows are for; None: whatever they are.
      bad_rows: counts the rows that are not as they should be.

    Raises:
      InputError: rows of a kind that is of no use for the purpose, or as `sources.read_rows`.
    """
    kind = "text" if format == "txt" else None if source.rows == "auto" else source.rows
    if kind is not None:
        with located(str(file)):
            check_purpose(kind, purpose)
    if format == "txt":
        for document in read_file(file, format, text_key=source.text_key, bad_rows=bad_rows):
            yield ReadRow(document.line, kind, Text(document.text))
        return
    for line, row in read_rows(file, format, bad_rows=bad_rows):
        if kind is None:
            # That a whole file is of no use is not the fault of single rows.
            with located(f"{file}:{line}"):
                kind = detect_kind(row, purpose, text_key=source.text_key)
                check_purpose(kind, purpose)
        with bad_rows.from_errors(f"{file}:{line}"):
            wanted = purpose or purpose_of(kind)
            found = detect_kind(row, wanted, text_key=source.text_key) if source.rows == "auto" else kind
            if found != kind:
                raise InputError(f"found a {found} row, expected a {kind} row as before it")
            yield ReadRow(line, kind, read_row(row, kind, text_key=source.text_key, system=source.system))


def fit(encoded: list[Tokens], example: Example, seq_len: int, too_long: TooLong) -> list[Tokens]:
    """Return what an example was encoded as if it has room, else nothing, or less.

    Raises:
      InputError: it has no room and `too_long` is "refuse", or nothing trained is left of it.
    """
    lengths = [len(tokens.ids) for tokens in encoded]
    size = sum(lengths) if isinstance(example, Pair) else max(lengths)
    if size <= seq_len:
        return encoded
    if too_long == "skip":
        return []
    if too_long == "refuse":
        room = "data.seq_len"
        if isinstance(example, Prompt):
            room = "a larger data.seq_len or a smaller rollout.max_new_tokens"
        raise InputError(
            f"found {size} tokens, expected at most {seq_len}; {room} gives more room, data.too_long 'skip' leaves "
            "such rows out"
        )
    cut = Tokens(*(part[:seq_len] for part in encoded[0]))
    if not cut.num_trained:
        raise InputError(f"nothing that is trained is left of {size} tokens when they are cut to {seq_len}")
    return [cut]


def up_to_end(tokens: Tokens) -> Tokens:
    """Return an example without what follows its last trained token: a score is read where the answer ends."""
    end = int(np.flatnonzero(tokens.labels != IGNORED)[-1]) + 1
    return Tokens(tokens.ids[:end], tokens.labels[:end])
