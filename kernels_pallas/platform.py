"""Which implementation serves which device."""

from __future__ import annotations

import jax

IMPLEMENTATIONS = ("tpu", "gpu", "reference")


def implementation(impl: str | None, interpret: bool = False) -> str:
    """Return `impl`, or for None the one that serves the default device: "tpu", "gpu", or "reference" on CPU.

    With `interpret`, which runs a kernel on a CPU, None is "tpu" there.

    The default device is jax.config.jax_default_device (as jax.default_device sets it) or the default backend's.

    Raises:
      ValueError: an unknown name, or a default device of a platform without an implementation.
    """
    if impl is None:
        impl = {"cpu": "tpu" if interpret else "reference", "cuda": "gpu", "rocm": "gpu"}.get(_platform(), _platform())
        if impl not in IMPLEMENTATIONS:
            raise ValueError(f"no implementation for devices of platform {impl!r}; choose impl from {IMPLEMENTATIONS}")
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl: found {impl!r}, expected one of {IMPLEMENTATIONS} or None")
    return impl


def device_kind() -> str:
    """Return the default device's kind, e.g. "TPU v5 lite" or "cpu"."""
    device = jax.config.jax_default_device
    return jax.devices()[0].device_kind if device is None or isinstance(device, str) else device.device_kind


def _platform() -> str:
    device = jax.config.jax_default_device
    if device is None:
        return jax.default_backend()
    return device if isinstance(device, str) else device.platform
