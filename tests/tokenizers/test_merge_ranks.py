"""Lists of merges against ranks: both must join the same bytes in the same order."""

import itertools

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.tokenizers.merge_ranks import BYTES, effective_tokens


def merge_by_list(text: bytes, merges: list[tuple[bytes, bytes]]) -> list[bytes]:
    """Join, again and again, the leftmost of the neighbours that stand first in the list."""
    order = {pair: step for step, pair in reversed(list(enumerate(merges)))}
    parts = [bytes([byte]) for byte in text]
    while pairs := [(order[pair], k) for k, pair in enumerate(itertools.pairwise(parts)) if pair in order]:
        _, k = min(pairs)
        parts[k : k + 2] = [parts[k] + parts[k + 1]]
    return parts


def merge_by_rank(text: bytes, merged: list[bytes]) -> list[bytes]:
    tokens = [*BYTES, *merged]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("test", pat_str=r"[\s\S]+", mergeable_ranks=ranks, special_tokens={})
    return [tokens[rank] for rank in encoding.encode(text.decode())]


@st.composite
def merge_lists(draw):
    """Merges of tokens over two letters, each part mostly made by an earlier merge; the same token in several ways."""
    tokens, merges = [b"a", b"b"], []
    for _ in range(draw(st.integers(1, 12))):
        pair = draw(st.sampled_from(tokens)), draw(st.sampled_from(tokens))
        if pair not in merges and len(pair[0] + pair[1]) <= 8:
            merges.append(pair)
            tokens.append(pair[0] + pair[1])
    if draw(st.booleans()):
        known = set(tokens)
        ways = [(token, k) for token in dict.fromkeys(tokens) for k in range(1, len(token))]
        merges = [(t[:k], t[k:]) for t, k in ways if t[:k] in known and t[k:] in known]
    if draw(st.integers(0, 3)) == 0:
        merges = draw(st.permutations(merges))
    return merges


@settings(max_examples=300)
@given(merge_lists(), st.lists(st.text("ab", min_size=1, max_size=16), min_size=4, max_size=4))
def test_ranks_join_what_the_list_joins_or_the_list_is_refused(merges, texts):
    try:
        merged = effective_tokens(merges)
    except InputError:
        return
    for text in texts:
        assert merge_by_rank(text.encode(), merged) == merge_by_list(text.encode(), merges)


def test_a_token_that_its_own_merges_do_not_reach_gets_no_rank():
    # From the left, "aab" is a|a|b -> aa|b: nothing joins aa and b, and ab is never there.
    merges = [(b"a", b"a"), (b"a", b"b"), (b"a", b"ab")]
    assert merge_by_list(b"aab", merges) == [b"aa", b"b"]
    assert effective_tokens(merges) == [b"aa", b"ab"]


def test_the_seam_comes_first_where_a_step_from_the_left_reaches_it():
    merges = [(b"a", b"a"), (b"b", b"a"), (b"ba", b"aa")]
    assert effective_tokens(merges) == [b"aa", b"ba"]
    assert merge_by_list(b"baaa", merges) == [b"b", b"aa", b"a"]


def test_a_merge_of_parts_that_are_made_later_is_refused():
    with pytest.raises(InputError, match=r"merges\[0\]: needs the token b'bc', which only merges\[1\] makes"):
        effective_tokens([(b"a", b"bc"), (b"b", b"c")])
    assert effective_tokens([(b"a", b"b"), (b"ab", b"c"), (b"a", b"bc"), (b"b", b"c")]) == [b"ab", b"abc", b"bc"]
