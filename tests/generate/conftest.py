import pytest
from hash_model import HashModel

from jax_epmoe import make_mesh


@pytest.fixture
def hash_model():
    def make(dp_size: int = 1, **kwargs) -> HashModel:
        return HashModel(make_mesh(dp_size=dp_size), **kwargs)

    return make
