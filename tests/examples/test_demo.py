"""`make demo`'s program, as a newcomer runs it."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_demo_beats_its_goal_on_held_out_text_and_writes_words():
    result = subprocess.run(
        [sys.executable, "examples/demo/demo.py"], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert result.returncode == 0, result.stderr[-3000:]
    bits = {name: float(value) for name, value in re.findall(r"(\w+) model: +([\d.]+) bits per byte", result.stdout)}
    assert bits["this"] <= 2.4 < bits["unigram"], result.stdout
    devices = set(re.findall(r"^ +(cpu:\d|cuda:\d) +expert", result.stdout, re.MULTILINE))
    assert len(devices) == 8, result.stdout
    written = result.stdout.split("4. Let it write")[1]
    words = re.findall(r"\b(the|and|my|of|to|is|that|not|you)\b", written)
    assert len(words) > 15, written


def test_demo_checkpoint_is_small():
    files = (ROOT / "examples" / "demo" / "checkpoint").iterdir()
    assert sum(file.stat().st_size for file in files) <= 12e6
