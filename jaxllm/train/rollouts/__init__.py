"""Answers of a policy, what they are worth, and what is learned from them."""
