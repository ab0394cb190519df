"""What kernels ask the device that they will run on."""

import re

import jax
from jax.sharding import Mesh


def compute_capability() -> int:
    """Of JAX's default device: 89 for 8.9; 0 where it is no NVIDIA GPU."""
    found = re.fullmatch(r"(\d+)\.(\d)", str(getattr(jax.devices()[0], "compute_capability", "")))
    return 10 * int(found[1]) + int(found[2]) if found else 0


def on_hopper() -> bool:
    return compute_capability() == 90


def backend_on(mesh: Mesh, backend: str | None) -> str | None:
    """`backend`; or "xla" where none is named and the mesh is of CPUs: kernels are chosen for the default device."""
    return "xla" if backend is None and mesh.devices.flat[0].platform == "cpu" else backend


def num_sms() -> int:
    """How many CTAs run at a time: one a streaming multiprocessor."""
    return getattr(jax.devices()[0], "core_count", None) or 132  # an H100's, where there is no GPU to ask
