"""What all programs of `bench` promise."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def refuses_other_devices(module: str) -> None:
    """Without a Hopper GPU: status 2, one line on standard error, nothing on standard output."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.strip().splitlines() == [f"{module} needs an NVIDIA Hopper GPU; this is cpu"]
