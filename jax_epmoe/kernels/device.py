"""What kernels ask the device that they will run on."""

import jax


def on_hopper() -> bool:
    """Whether JAX's default device has compute capability 9.0."""
    return getattr(jax.devices()[0], "compute_capability", "") == "9.0"


def num_sms() -> int:
    """How many CTAs run at a time: one a streaming multiprocessor."""
    return getattr(jax.devices()[0], "core_count", None) or 132  # an H100's, where there is no GPU to ask
