"""libtpu on a machine without a TPU."""

from __future__ import annotations

import os
from pathlib import Path

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
_DEVICE_FILES = ("accel*", "vfio/*")


def set_up_libtpu() -> None:
    """Tell libtpu what it would else ask the network for, with warnings; must run before it loads."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def hush_libtpu() -> None:
    """Keep libtpu, installed for planning, quiet where jax finds that there is no TPU."""
    if not any(any(Path("/dev").glob(pattern)) for pattern in _DEVICE_FILES):
        set_up_libtpu()
