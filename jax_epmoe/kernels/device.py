"""What kernels ask the device that they will run on."""

import re

import jax


def compute_capability() -> int:
    """Of JAX's default device: 89 for 8.9; 0 where it is no NVIDIA GPU."""
    found = re.fullmatch(r"(\d+)\.(\d)", str(getattr(jax.devices()[0], "compute_capability", "")))
    return 10 * int(found[1]) + int(found[2]) if found else 0


def on_hopper() -> bool:
    return compute_capability() == 90


def num_sms() -> int:
    """How many CTAs run at a time: one a streaming multiprocessor."""
    return getattr(jax.devices()[0], "core_count", None) or 132  # an H100's, where there is no GPU to ask
