"""Generated ids as a stream of text."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from jaxllm.generate.engine import Generator
from jaxllm.tokenizers.base import StreamDecoder, Tokenizer


def stream_text(
    generator: Generator,
    tokenizer: Tokenizer,
    *,
    prompt: Sequence[int],
    stop_ids: Collection[int],
    stop_strings: Sequence[str] = (),
) -> Iterator[str]:
    """Yield the text of the first row as it is generated, up to the first stop id or stop string.

    Args:
      prompt: the ids that the text continues.
    """
    pieces = _decoded(generator, StreamDecoder(tokenizer, after=prompt), stop_ids)
    return pieces if not stop_strings else _until(pieces, stop_strings)


def _decoded(generator: Generator, decoder: StreamDecoder, stop_ids: Collection[int]) -> Iterator[str]:
    while not generator.done:
        token = int(generator.decode(1)[0, 0])
        if token not in stop_ids:
            yield decoder.push(token)
    yield decoder.finish()


def _until(pieces: Iterator[str], stop_strings: Sequence[str]) -> Iterator[str]:
    """Yield text up to the first stop string, holding back what may be the beginning of one."""
    held = ""
    for piece in pieces:
        held += piece
        ends = [held.find(stop) for stop in stop_strings if stop in held]
        if ends:
            yield held[: min(ends)]
            return
        keep = max(_overlap(held, stop) for stop in stop_strings)
        yield held[: len(held) - keep]
        held = held[len(held) - keep :]
    yield held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that `stop` begins with."""
    return max(size for size in range(min(len(text), len(stop)) + 1) if text.endswith(stop[:size]))
