"""The attention mask against its definition, cell by cell."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxllm.nn.masks import attention_mask

ROWS, QUERIES, KEYS = 2, 4, 7


@given(
    key_segments=hnp.arrays(np.int32, (ROWS, KEYS), elements=st.integers(0, 3)),
    query_segments=hnp.arrays(np.int32, (ROWS, QUERIES), elements=st.integers(0, 3)),
    first=st.integers(0, KEYS - QUERIES),
)
def test_a_query_sees_earlier_slots_of_its_own_document(key_segments, query_segments, first):
    distance = jnp.asarray(first + np.arange(QUERIES)[:, None] - np.arange(KEYS))
    mask = np.asarray(attention_mask(distance, jnp.asarray(query_segments), jnp.asarray(key_segments)))
    for row, query, key in np.ndindex(mask.shape):
        document = key_segments[row, key]
        allowed = document != 0 and document == query_segments[row, query] and key <= query + first
        assert mask[row, query, key] == allowed
