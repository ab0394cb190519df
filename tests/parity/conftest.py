"""The parity checkpoints, converted by the real converter once a session (once a worker under xdist)."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from weights_convert import convert

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@pytest.fixture(scope="session")
def converted(tmp_path_factory):
    """`converted(name, **changes)`: the folder of a parity checkpoint in our format, with keys of config.json changed."""

    @cache
    def make(name: str, **changes: object) -> Path:
        folder = tmp_path_factory.mktemp(name)
        source = CHECKPOINTS / name
        if changes:
            source = folder / "source"
            shutil.copytree(CHECKPOINTS / name, source)
            config = json.loads((source / "config.json").read_text()) | changes
            (source / "config.json").write_text(json.dumps(config))
        convert(source, folder / "converted", progress=False)
        return folder / "converted"

    return make


@pytest.fixture(scope="session")
def expected():
    """`expected(name)`: what a right model computes, as tests/parity/README.md lists it."""

    @cache
    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(CHECKPOINTS / name / "expected.npz") as file:
            return dict(file)

    return load
