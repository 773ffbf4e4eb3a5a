"""The training step compiled for chips that are not there, and what its program tells."""
