"""Converted checkpoints compute what transformers (for DeepSeek-V2: DeepSeek's published code) does, on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_epmoe import load_model, make_mesh
from jax_epmoe.generate import Engine, SamplingParams

MESHES = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 2, 1), (8, 4, 1), (8, 8, 1), (2, 2, 2)]  # tp_size, ep_size, dp_size
NUM_EXPERTS = {
    "mixtral": 12,
    "olmoe": 24,
    "deepseek_v2_lite": 12,
    "deepseek_v2": 24,
    "deepseek_v3": 16,
    "dots1": 16,
    "glm4_moe": 16,
    "gpt_oss": 16,
    "qwen2_moe": 12,
    "qwen3_moe": 16,
}
CASES = [(name, mesh, False) for name, experts in NUM_EXPERTS.items() for mesh in MESHES if experts % mesh[1] == 0]
CASES += [
    (name, (4, 2, 1), True) for name in ("olmoe", "deepseek_v3", "gpt_oss", "qwen2_moe")
]  # with data-parallel attention
CASES += [("gpt_oss_mxfp4", (2, 2, 1), False)]
# Families share their meshes' code: each on eight devices in `make test`, on all meshes in `make test-slow`.
SLOW = [(name, mesh, False) for name in NUM_EXPERTS for mesh in MESHES if mesh != (8, 4, 1)]
FAST_COMPILE = {"xla_backend_optimization_level": 0}

TOLERANCE = 1e-4
BATCH, CHUNK, NEW_TOKENS = 4, 8, 12


def relative_error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def four_rows(array: np.ndarray) -> np.ndarray:
    """The three stored sequences and the first again: a batch that two replicas can share."""
    return np.concatenate([array, array[:1]])


def load(folder, mesh, dp_attention=False):
    return load_model(folder, mesh=make_mesh(*mesh), dtype=jnp.float32, dp_attention=dp_attention)


class Case:
    """A converted checkpoint on a mesh: one program for whole sequences, one for pieces of CHUNK tokens, one for single ones."""

    def __init__(self, folder, stored, mesh, dp_attention=False):
        self.model = load(folder, mesh, dp_attention)
        self.stored = stored
        graphdef, self._state = nnx.split(self.model)

        def whole(state, tokens):
            return nnx.merge(graphdef, state)(tokens)

        def step(state, tokens, start, cache, num_tokens):
            model = nnx.merge(graphdef, state)
            hidden, cache = model.hidden(tokens, start, cache, num_tokens)
            return model.logits(hidden), cache

        self._whole = jax.jit(whole, compiler_options=FAST_COMPILE)
        self._step = jax.jit(step, compiler_options=FAST_COMPILE)

    def whole(self, tokens) -> jax.Array:
        return self._whole(self._state, tokens)

    def step(self, tokens, start, cache, num_tokens=None):
        num_tokens = np.full(BATCH, tokens.shape[1]) if num_tokens is None else num_tokens
        return self._step(self._state, tokens, np.asarray(start, np.int32), cache, np.asarray(num_tokens, np.int32))


@pytest.fixture(
    scope="module",
    params=[pytest.param(case, marks=pytest.mark.slow) if case in SLOW else case for case in CASES],
    ids=lambda case: f"{case[0]}-{'x'.join(map(str, case[1]))}{'-dp_attention' * case[2]}",
)
def case(request, converted, expected):
    name, mesh, dp_attention = request.param
    return Case(converted(name), expected(name), mesh, dp_attention)


def test_whole_sequence_logits_are_the_stored_ones(case):
    logits = case.whole(four_rows(case.stored["tokens"]))
    assert logits.dtype == jnp.float32
    assert relative_error(logits, four_rows(case.stored["logits"])) < TOLERANCE


def test_logits_with_the_cache_are_those_of_the_whole_sequence(case):
    """Pieces of 8 tokens, then one at a time (MLA's absorbed form), each from where the last call ended."""
    tokens, want = four_rows(case.stored["tokens"]), four_rows(case.stored["logits"])
    cache = case.model.init_cache(BATCH, 64)
    pieces, position = [], 0
    for length in [CHUNK, CHUNK, *[1] * 8]:
        logits, cache = case.step(tokens[:, position : position + length], [position] * BATCH, cache)
        pieces.append(logits)
        position += length
    assert position == tokens.shape[1]
    prefilled, decoded = np.concatenate(pieces[:2], axis=1), np.concatenate(pieces[2:], axis=1)
    errors = {
        "prefilled": relative_error(prefilled, want[:, : 2 * CHUNK]),
        "decoded": relative_error(decoded, want[:, 2 * CHUNK :]),
    }
    assert max(errors.values()) < TOLERANCE, errors


def test_greedy_tokens_of_a_ragged_batch_are_those_of_each_prompt_alone(case):
    """Prompts of 1 to 37 tokens side by side: right-padded pieces, then each row decodes at its own position."""
    prompts, lengths = case.stored["prompts"], case.stored["prompt_lengths"]
    padded = np.pad(prompts, ((0, 0), (0, -prompts.shape[1] % CHUNK)))
    cache = case.model.init_cache(BATCH, 64)
    last = np.zeros((BATCH, padded.shape[1], case.model.config.vocab_size), np.float32)
    for position in range(0, padded.shape[1], CHUNK):
        piece = slice(position, position + CHUNK)
        logits, cache = case.step(
            padded[:, piece], [position] * BATCH, cache, num_tokens=np.clip(lengths - position, 0, CHUNK)
        )
        last[:, piece] = logits
    token = last[np.arange(BATCH), lengths - 1].argmax(-1)
    made = [token]
    for i in range(NEW_TOKENS - 1):
        logits, cache = case.step(token[:, None].astype(np.int32), lengths + i, cache)
        token = np.asarray(logits)[:, 0].argmax(-1)
        made.append(token)
    assert np.stack(made, axis=1).tolist() == case.stored["greedy"].tolist()


# The engine does not know families: two of them, GQA and MLA, and all in `make test-slow`.
@pytest.mark.parametrize(
    "name",
    [n if n in ("olmoe", "deepseek_v3") else pytest.param(n, marks=pytest.mark.slow) for n in NUM_EXPERTS],
)
@pytest.mark.parametrize(("mesh", "max_batch_size"), [((2, 1, 1), 1), ((2, 2, 2), 4)], ids=["alone", "batched"])
def test_the_engine_writes_the_stored_greedy_tokens(converted, expected, name, mesh, max_batch_size):
    stored = expected(name)
    prompts = [ids[:n].tolist() for ids, n in zip(stored["prompts"], stored["prompt_lengths"], strict=True)]
    engine = Engine(load(converted(name), mesh), max_batch_size=max_batch_size, prefill_chunk=16)
    completions = engine.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    assert [c.token_ids for c in completions] == stored["greedy"].tolist()


@pytest.mark.parametrize("mesh", [(1, 1, 1), (8, 8, 1)], ids=["1x1x1", "8x8x1"])
def test_deepseek_v2_with_norm_topk_prob_follows_the_published_code(converted, expected, mesh):
    """It divides by the sum instead of multiplying by `routed_scaling_factor`; transformers ignores the key."""
    stored = expected("deepseek_v2")
    logits = Case(converted("deepseek_v2", norm_topk_prob=True), stored, mesh).whole(stored["tokens"])
    assert relative_error(logits, stored["logits_norm_topk_prob"]) < TOLERANCE
    assert relative_error(logits, stored["logits"]) > 0.1
