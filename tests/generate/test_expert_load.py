"""Rows of each expert over time: what the decoder counts, what the file keeps."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jax_epmoe as ep
from jax_epmoe.generate.expert_load import ExpertLoad, read_expert_load


def test_windows_grow_and_lose_no_row():
    recorder = ExpertLoad("m", layers=[1, 2], num_experts=3, top_k=2, most_windows=4)
    steps = np.arange(11 * 6).reshape(11, 2, 3)
    for rows in steps:
        recorder.add(rows)
    recorded = recorder.recorded()
    assert recorded.first_step.tolist() == [0, 4, 8]
    np.testing.assert_array_equal(recorded.rows, [steps[:4].sum(0), steps[4:8].sum(0), steps[8:].sum(0)])
    assert (np.diff(recorded.seconds) > 0).all()
    assert recorded.seconds[0] >= 0


def test_a_file_gives_back_what_was_recorded(tmp_path):
    recorder = ExpertLoad("olmoe", layers=[0, 2], num_experts=4, top_k=2)
    recorder.add(np.array([[1, 2, 3, 0], [0, 0, 0, 6]]))
    recorder.add(np.array([[2, 2, 0, 0], [1, 1, 1, 1]]))
    recorder.save(tmp_path / "load")
    recorded, got = recorder.recorded(), read_expert_load(tmp_path / "load")
    for name, value in vars(recorded).items():
        np.testing.assert_array_equal(getattr(got, name), value, err_msg=name)
    assert got.rows.shape == (2, 2, 4)


@pytest.mark.parametrize("content", [b"", b"{}", b"PK\x03\x04 no zip"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "load").write_bytes(content)
    with pytest.raises(ValueError, match=r"load is no readable \.npz; it should be a file that --expert-load wrote"):
        read_expert_load(tmp_path / "load")
    np.savez(tmp_path / "other.npz", rows=np.zeros(3))
    with pytest.raises(ValueError, match=r"fields is \['rows'\]"):
        read_expert_load(tmp_path / "other.npz")


def test_rows_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"rows.shape is \(3, 1\); it should be \(1, 3\)"):
        ExpertLoad("m", [0], 3, 1).add(np.zeros((3, 1)))


def test_the_decoder_counts_real_tokens_and_counting_changes_nothing(small_decoder):
    model = small_decoder
    graphdef, state = nnx.split(model)
    tokens = jnp.arange(2 * 8).reshape(2, 8)
    start, num_tokens = jnp.zeros(2, jnp.int32), jnp.array([8, 3])

    @jax.jit
    def both(state):
        model = nnx.merge(graphdef, state)
        cache = model.init_cache(2, 16)
        hidden, _ = model.hidden(tokens, start, cache, num_tokens)
        other, _, load = model.hidden_with_load(tokens, start, cache, num_tokens)
        return hidden, other, load

    hidden, other, load = both(state)
    np.testing.assert_array_equal(hidden, other)
    config = model.config.moe
    assert load.shape == (1, config.num_experts)
    np.testing.assert_array_equal(np.sum(load, axis=1), (8 + 3) * config.top_k)
    recorder = ExpertLoad.of(model.config)
    assert (recorder.layers, recorder.shape, recorder.top_k) == ((1,), load.shape, config.top_k)


@pytest.fixture
def small_decoder(tmp_path):
    config = {
        "model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 64, "num_experts": 8,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "mlp_only_layers": [0], "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ep.dummy_model(tmp_path, mesh=ep.make_mesh(), dtype="float32")
