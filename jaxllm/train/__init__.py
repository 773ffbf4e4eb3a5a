"""Training: schedules, the optimizer, the step and the loop."""

from jaxllm.train.optimizer import apply_updates, make_optimizer, update_params
from jaxllm.train.schedule import batch_ramp, constant, cosine, linear_ramp, multistep, wsd

__all__ = [
    "apply_updates",
    "batch_ramp",
    "constant",
    "cosine",
    "linear_ramp",
    "make_optimizer",
    "multistep",
    "update_params",
    "wsd",
]
