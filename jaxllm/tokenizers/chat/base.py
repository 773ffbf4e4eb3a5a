"""The chat format: a conversation becomes special tokens and pieces of text, each of which is trained on or not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxllm.errors import InputError
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.chat.messages import Conversation, ConversationReader, Rules, Tools

IGNORED = -100
"""Label of a position that is not trained on."""

Labels = Literal["assistant", "published"]


@dataclass(frozen=True, slots=True)
class Special:
    """A special token.

    Attributes:
      text: its text in the vocabulary.
      trained: whether the model learns to predict it.
      id: its id where the family fixes the id and not the text; None takes the id that the vocabulary has for the text.
      learns: the token that the model learns to predict at this place instead of this one.
    """

    text: str
    trained: bool = False
    id: int | None = None
    learns: Special | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Ordinary text; special tokens spelled in it stay text.

    Attributes:
      text: the text.
      trained: whether the model learns to predict it.
      joined: whether it is tokenised in one call with the text right before it.
    """

    text: str
    trained: bool = False
    joined: bool = False


Segment = Special | Text


@dataclass(frozen=True)
class ChatTokens:
    """Token ids of a conversation and what is learned at each place.

    Attributes:
      ids: token ids [T].
      labels: at place t the id that the model learns to predict from the tokens before t, or IGNORED [T]. It is
        ids[t], but for Baichuan 2, which learns the end of a reply at the token that begins the next turn.
    """

    ids: list[int]
    labels: list[int]

    @property
    def loss_mask(self) -> list[bool]:
        """Whether place t is trained on [T]."""
        return [label != IGNORED for label in self.labels]


@dataclass(frozen=True)
class Sampling:
    """How a family samples replies unless told otherwise.

    Attributes:
      temperature, top_p, top_k, repetition_penalty: as in `LanguageModel.generate`; None is off.
      max_new_tokens: longest reply, tokens.
      max_length: longest prompt and reply together, tokens. One of the two is set.
    """

    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None
    max_length: int | None = None

    def reply_limit(self, prompt_length: int) -> int:
        """Return how many tokens a reply to a prompt of so many tokens may have, at least 0."""
        limits = [] if self.max_new_tokens is None else [self.max_new_tokens]
        if self.max_length is not None:
            limits.append(self.max_length - prompt_length)
        return max(0, min(limits))


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How one family writes conversations.

    Attributes:
      name: key in CHAT_FORMATS.
      rules: which roles, orders and tools the format has.
      render: yields the segments of a conversation.
      parse_reply: turns the text of a reply into a message; the tools say what may be taken for a call.
      template: jinja template that writes the same text.
      stop_tokens: special tokens that end a reply.
      stop_strings: texts that end a reply, for formats whose end of turn is no special token.
      sampling: the family's defaults.
      has_published_labels: whether the family published a training script whose labels we can follow.
      history_window: most tokens that system message and earlier rounds may have, where the family drops history.
      empty_system_is_none: an empty system message leaves out the default one, so that there is none.
    """

    name: str
    rules: Rules
    render: Callable[[Conversation], Iterator[Segment]]
    parse_reply: Callable[[str, Tools], dict[str, Any]]
    template: str
    stop_tokens: tuple[Special, ...]
    sampling: Sampling
    stop_strings: tuple[str, ...] = ()
    has_published_labels: bool = False
    history_window: int | None = None
    empty_system_is_none: bool = False

    def segments(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        labels: Labels = "assistant",
    ) -> list[Segment]:
        """Return the special tokens and texts of a conversation.

        Args:
          messages: messages as in OpenAI's API, in order; "observation" and "function" are other names of "tool".
          tools: definitions of tools as in OpenAI's API.
          add_generation_prompt: end where the assistant begins to speak.
          labels: "assistant" trains on the assistant's text and the token that ends it; "published" on what the
            family's own training script trains on. What the assistant says in a message with "weight": 0 is not
            trained on, nor is the token that ends it; the published labels keep what else they hold of it.

        Raises:
          InputError: names the message or tool, the format, what was found and what was expected.
        """
        if labels not in ("assistant", "published"):
            raise InputError(f'labels: found {labels!r}, expected "assistant" or "published"')
        if labels == "published" and not self.has_published_labels:
            raise InputError(f'chat format {self.name}: labels: the family published none; expected "assistant"')
        conversation = self._reader.read(
            messages, tools, add_generation_prompt=add_generation_prompt, published_labels=labels == "published"
        )
        return list(self.render(conversation))

    def render_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Return the conversation as text, special tokens spelled out; raises InputError as `segments` does."""
        segments = self.segments(messages, tools, add_generation_prompt=add_generation_prompt)
        return "".join(segment.text for segment in segments)

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        labels: Labels = "assistant",
    ) -> ChatTokens:
        """Return the conversation's token ids and labels; arguments and errors as in `segments`.

        Also raises InputError where the tokenizer lacks a special token of the format.
        """
        segments = self.segments(messages, tools, add_generation_prompt=add_generation_prompt, labels=labels)
        tokens = ChatTokens([], [])
        for run in _runs(segments):
            if isinstance(run, Special):
                self._append_special(tokens, run, tokenizer)
            else:
                _append_text(tokens, run, tokenizer)
        return tokens

    def stop_ids(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return the ids that end a reply; raises InputError where the tokenizer lacks one."""
        return tuple(self._special_id(token, tokenizer) for token in self.stop_tokens)

    def parse(self, text: str, tools: Sequence[Mapping[str, Any]] | None = None) -> dict[str, Any]:
        """Return the message of a reply: {"role", "content"} and "tool_calls" where it is a well-formed call.

        Args:
          text: what the model wrote after the generation prompt; a stop token or stop string at its end is dropped.
          tools: the definitions that the prompt was made with; without them nothing is taken for a call.
        """
        for end in (*(token.text for token in self.stop_tokens), *self.stop_strings):
            text = text.removesuffix(end)
        return self.parse_reply(text, self._reader.read_tools(tools))

    def drop_history(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], *, max_tokens: int
    ) -> list[Mapping[str, Any]]:
        """Return the messages without the oldest rounds that do not fit; a round begins with the user's message.

        The system message and the last round always stay. Of the rounds between, the newest stay as long as the
        system message and they have at most `max_tokens` tokens: the rule of make_context in Qwen's
        qwen_generation_utils.py, which does not count the last round either. Raises InputError as `segments` does.
        """
        self.segments(messages)
        system, rounds = _split_rounds(messages)
        kept: list[Mapping[str, Any]] = []
        for earlier in reversed(rounds[:-1]):
            if len(self.encode(tokenizer, [*system, *earlier, *kept]).ids) > max_tokens:
                break
            kept = [*earlier, *kept]
        return [*system, *kept, *(rounds[-1] if rounds else [])]

    def jinja_template(self) -> str:
        """Return a chat_template for tokenizer_config.json that transformers renders to the same text."""
        return self.template

    @property
    def _reader(self) -> ConversationReader:
        return ConversationReader(self.name, self.rules)

    def _append_special(self, tokens: ChatTokens, token: Special, tokenizer: Tokenizer) -> None:
        tokens.ids.append(self._special_id(token, tokenizer))
        label = self._special_id(token.learns or token, tokenizer) if token.trained else IGNORED
        tokens.labels.append(label)

    def _special_id(self, token: Special, tokenizer: Tokenizer) -> int:
        if token.id is not None:
            if token.id >= tokenizer.vocab_size:
                found = f"the tokenizer has {tokenizer.vocab_size:,} ids"
                raise InputError(f"chat format {self.name}: {found}, expected the special token {token.id:,} too")
            return token.id
        if token.text not in tokenizer.special_tokens:
            raise InputError(f"chat format {self.name}: the tokenizer has no special token {token.text!r}")
        return tokenizer.special_tokens[token.text]


def _runs(segments: Iterable[Segment]) -> Iterator[Special | list[Text]]:
    """Yield special tokens, and lists of texts that are tokenised in one call."""
    run: list[Text] = []
    for segment in segments:
        if run and not (isinstance(segment, Text) and segment.joined):
            yield run
            run = []
        if isinstance(segment, Special):
            yield segment
        else:
            run.append(segment)
    if run:
        yield run


def _append_text(tokens: ChatTokens, run: Sequence[Text], tokenizer: Tokenizer) -> None:
    """Append texts tokenised in one call; a token that spans two of them counts to the later one."""
    ids = tokenizer.encode("".join(part.text for part in run))
    trained: list[bool] = []
    for k, part in enumerate(run[:-1]):
        if part.trained != run[k + 1].trained:
            end = _common_length(ids, tokenizer.encode("".join(part.text for part in run[: k + 1])))
            trained += [part.trained] * (end - len(trained))
    trained += [run[-1].trained] * (len(ids) - len(trained))
    tokens.ids.extend(ids)
    tokens.labels.extend(token_id if learn else IGNORED for token_id, learn in zip(ids, trained, strict=True))


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _split_rounds(
    messages: Sequence[Mapping[str, Any]],
) -> tuple[list[Mapping[str, Any]], list[list[Mapping[str, Any]]]]:
    system: list[Mapping[str, Any]] = []
    rounds: list[list[Mapping[str, Any]]] = []
    for index, message in enumerate(messages):
        if index == 0 and message.get("role") == "system":
            system.append(message)
        elif message.get("role") == "user" or not rounds:
            rounds.append([message])
        else:
            rounds[-1].append(message)
    return system, rounds
