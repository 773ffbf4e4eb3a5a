"""Files of Ghost Attention's rows, whose replies a model gives; see `data.ghost_attention`.

The random numbers of a reply follow from the seed, the number of its conversation and that of the question alone: which
conversations are answered together, and where the work was interrupted, does not matter.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax

from jaxllm.config.alignment import ChatConfig
from jaxllm.config.schema import SourceConfig
from jaxllm.data.encoders import find_chat_format
from jaxllm.data.examples import Encoder, Places, read_examples
from jaxllm.data.ghost_attention import (
    Constraint,
    Instruction,
    draw_instruction,
    ghost_dialogue,
    read_constraints,
)
from jaxllm.data.rows import Dialogue, Message
from jaxllm.data.sources import BadRows, find_files
from jaxllm.data.token_rows import find_prefix_ids
from jaxllm.errors import InputError, located
from jaxllm.files import require_new_file
from jaxllm.generate.replies import Replier, draw_keys
from jaxllm.generate.rollout import Sampler
from jaxllm.sharding.mesh import make_mesh
from jaxllm.train.found_model import FoundModel
from jaxllm.train.rollouts.sampled_rows import Journal, Row, write_rows
from jaxllm.train.run_models import find_model
from jaxllm.train.signals import StopSignal


@dataclasses.dataclass(frozen=True, kw_only=True)
class GhostOptions:
    """How replies are sampled.

    Attributes:
      temperature: 0 takes the likeliest tokens.
      chat: name of the chat format; None: that of the run, or of the model's family.
    """

    seed: int = 0
    max_new_tokens: int = 512
    temperature: float = 1.0
    top_p: float | None = None
    chat: str | None = None


class Written(NamedTuple):
    """What became of the conversations.

    Attributes:
      rows: in the output. stopped: a signal came.
      left_out: conversations with a reply that has no end or is blank, or for which replies left no room.
    """

    rows: int = 0
    left_out: int = 0
    stopped: bool = False


class Conversation(NamedTuple):
    """A conversation, and its "path:line"."""

    messages: list[Message]
    origin: str


def write_ghost_rows(
    model: str,
    dialogues: Sequence[str],
    constraints: str,
    output: Path,
    options: GhostOptions,
    *,
    batch_size: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> Written:
    """Have a model answer the questions of conversations with instructions, and write rows to fine-tune on.

    What is done is kept beside the output until all is; the same call goes on from there.

    Args:
      model: a run, a published folder or a .gguf file. dialogues: files of conversations. constraints: a JSON file.
      output: a new .jsonl file of rows {"messages", "origin"}.
      batch_size: conversations answered together.
      progress: called with conversations done and all of them.

    Raises:
      InputError: bad files, a conversation that the model has no room for, or an output that exists.
    """
    require_new_file(output)
    kinds = read_constraints(constraints)
    conversations = list(_conversations(dialogues))
    found = find_model(model)
    found.require_language_model()
    journal = Journal(output, _identity(found, conversations, kinds, options))
    with StopSignal() as signals:
        work = _Work(_replier(found, options), conversations, kinds, options)
        work.check()
        journal.open()
        try:
            for start in range(len(journal.rows()), len(conversations), batch_size):
                numbers = range(start, min(start + batch_size, len(conversations)))
                rows = work.rows(numbers, stop=lambda: signals.received is not None)
                if rows is None:
                    return Written(stopped=True)
                journal.add(rows)
                if progress is not None:
                    progress(len(journal.rows()), len(conversations))
        finally:
            journal.close()
    rows = [row for row in journal.rows() if row["messages"]]
    write_rows(output, rows)
    journal.remove()
    return Written(len(rows), len(conversations) - len(rows))


def _conversations(paths: Sequence[str]) -> Iterator[Conversation]:
    for path in paths:
        for file, format in find_files(path):
            for row in read_examples(file, format, SourceConfig(path=str(file)), "sft", BadRows()):
                if not isinstance(row.example, Dialogue):
                    raise InputError(f"{file}:{row.line}: found a text, expected conversations")
                yield Conversation(row.example.messages, f"{file}:{row.line}")


def _identity(
    found: FoundModel, conversations: Sequence[Conversation], constraints: Sequence[Constraint], options: GhostOptions
) -> str:
    """Return what an unfinished output must share with those who go on with it."""
    parts = [found.identity(), conversations, constraints, dataclasses.asdict(options)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _replier(found: FoundModel, options: GhostOptions) -> Replier:
    tokenizer = found.tokenizer()
    if tokenizer is None:
        raise InputError(f"{found.path}: found no tokenizer; put its files into the model's folder")
    name = options.chat or found.chat_format(tokenizer)
    if name is None:
        raise InputError(f"{found.path}: this model has no chat format of its own; name one with --chat-format")
    spec, mesh = found.spec, make_mesh()
    prefix_ids = find_prefix_ids(spec, None, {}, tokenizer)
    chat = find_chat_format(name, tokenizer)
    encoder = Encoder(tokenizer=tokenizer, chat=chat, options=ChatConfig(), places=Places(spec, prefix_ids))
    most = spec.max_position_embeddings - options.max_new_tokens
    if most < 1:
        raise InputError(
            f"--max-new-tokens: found {options.max_new_tokens}, but the model has {spec.max_position_embeddings} "
            "positions for prompt and reply"
        )
    sampler = Sampler(
        spec,
        mesh=mesh,
        eos_ids=encoder.stop_ids(),
        seq_len=spec.max_position_embeddings,
        max_new_tokens=options.max_new_tokens,
        num_ids=min(tokenizer.vocab_size, spec.vocab_size),
        prefix_ids=prefix_ids,
        temperature=options.temperature or 1.0,
        top_p=options.top_p,
    )
    with jax.set_mesh(mesh):
        return Replier(params=found.model(mesh, None), encoder=encoder, sampler=sampler, most=most)


class _Dialogue:
    """A conversation under way.

    Attributes:
      asked: what is to be answered next; None when it is over.
      row: the row that came of it; None before, and where it was given up.
    """

    def __init__(self, messages: Sequence[Message], instruction: Instruction):
        self._steps = ghost_dialogue(messages, instruction)
        self.asked: list[Message] | None = next(self._steps)
        self.row: Row | None = None

    def take(self, reply: str | None) -> None:
        """Go on with a reply, or give up without one."""
        try:
            self.asked = None if reply is None else self._steps.send(reply)
        except StopIteration as end:
            self.asked, self.row = None, end.value


@dataclasses.dataclass(frozen=True)
class _Work:
    """What is to be done, and who replies."""

    replier: Replier
    conversations: Sequence[Conversation]
    constraints: Sequence[Constraint]
    options: GhostOptions

    def check(self) -> None:
        """Raise InputError for a conversation without questions, or with a first one that is too long."""
        for number, conversation in enumerate(self.conversations):
            with located(conversation.origin):
                if not self.replier.fits(self._dialogue(number).asked):
                    raise InputError("no room for the first question and its reply among the model's positions")

    def rows(self, numbers: Sequence[int], stop: Callable[[], bool]) -> list[Row] | None:
        """Answer some conversations side by side, a question of each at a time; what was given up has no messages.

        Returns None if `stop` said so.
        """
        dialogues = {number: self._dialogue(number) for number in numbers}
        going, turn = dialogues, 0
        while going:
            keys = draw_keys(self.options.seed, [(number, turn) for number in going])
            asked = [dialogue.asked for dialogue in going.values()]
            replies = self.replier.reply(asked, keys, greedy=not self.options.temperature, stop=stop)
            if replies is None:
                return None
            for dialogue, reply in zip(going.values(), replies, strict=True):
                dialogue.take(reply)
                if dialogue.asked and not self.replier.fits(dialogue.asked):
                    dialogue.take(None)
            going, turn = {number: dialogue for number, dialogue in going.items() if dialogue.asked}, turn + 1
        return [
            (dialogue.row or {"messages": []}) | {"origin": self.conversations[number].origin}
            for number, dialogue in dialogues.items()
        ]

    def _dialogue(self, number: int) -> _Dialogue:
        instruction = draw_instruction(self.constraints, self.options.seed, number)
        return _Dialogue(self.conversations[number].messages, instruction)
