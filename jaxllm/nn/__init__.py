"""Pure model math: Flax Linen modules over plain array functions.

Shape letters: B batch, T query time, S key time, D hidden, N query heads, K key/value heads, G queries per key/value
head, H head dim, F feed-forward width, V vocabulary, L layers, C latent width, R rotated dimensions, E experts, M rows
of all experts together, k experts of a token.
"""
