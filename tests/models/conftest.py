"""What the tests of config.json share."""

import json

import pytest

from jax_epmoe.models.families import read_config


@pytest.fixture
def read(tmp_path):
    """`read(hf)`: the ModelConfig of a folder whose config.json holds `hf`, given as an object or as text."""

    def read(hf):
        text = hf if isinstance(hf, str) else json.dumps(hf)
        (tmp_path / "config.json").write_text(text)
        return read_config(tmp_path)

    return read


@pytest.fixture
def refused(read):
    """`refused(hf)`: the one line that refuses it."""

    def refused(hf) -> str:
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (every test checks the line itself)
            read(hf)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refused
