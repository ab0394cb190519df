"""What kernels ask the device that they will run on."""

import jax


def compute_capability() -> float:
    """Of JAX's default device, such as 9.0 (Hopper); 0.0 where that is no NVIDIA GPU."""
    return float(getattr(jax.devices()[0], "compute_capability", 0.0))


def on_hopper() -> bool:
    return compute_capability() == 9.0


def num_sms() -> int:
    """How many CTAs run at a time: one a streaming multiprocessor."""
    return getattr(jax.devices()[0], "core_count", None) or 132  # an H100's, where there is no GPU to ask
