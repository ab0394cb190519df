"""What a result was measured on: kept beside every figure."""

import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from jax_epmoe.kernels.device import on_hopper

RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("jax", "jaxlib", "flax", "jax_epmoe")


def environment() -> dict[str, Any]:
    """Device, versions and command line of this run."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind if device.platform != "cpu" else f"CPU ({platform.machine()})",
        "devices": jax.device_count(),
        "python": platform.python_version(),
        "versions": {name: version for name in _PACKAGES if (version := _version(name))},
        "command": shlex.join(["python", "-m", *_module_and_arguments()]),
    }


def result_path(name: str) -> Path:
    """Where a result of that name is kept, for this kind of device."""
    device = jax.devices()[0].device_kind.lower().replace(" ", "-")
    return RESULTS / f"{name}_{device}.json"


def require_hopper(program: str) -> None:
    """Ends the program with status 2 and one line unless JAX's first device is a Hopper GPU."""
    if not on_hopper():
        print(f"{program} needs an NVIDIA Hopper GPU; this is {jax.devices()[0].device_kind}", file=sys.stderr)
        sys.exit(2)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _module_and_arguments() -> list[str]:
    """The command without `--output`: where a result was kept does not matter."""
    spec = sys.modules["__main__"].__spec__
    arguments = sys.argv[1:]
    if "--output" in arguments:
        at = arguments.index("--output")
        arguments = arguments[:at] + arguments[at + 2 :]
    return [spec.name if spec else Path(sys.argv[0]).name, *arguments]
