"""The README's code is run as it stands."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def python_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_layer_example_is_short_and_runs():
    code = python_blocks()[0]
    assert len(code.splitlines()) < 20
    check = "\nassert y.shape == x.shape and y.dtype == x.dtype and jnp.isfinite(loss)\n"
    check += "assert len(layer.w_down[...].sharding.device_set) == 8\n"
    result = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_every_link_into_the_repository_leads_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
