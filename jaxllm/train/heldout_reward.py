"""Held-out evaluation of the policy stages: what answers to held-out prompts are worth."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.data.example_rows import PromptRows
from jaxllm.data.example_set import ExampleSet
from jaxllm.data.loader import TrainLoader
