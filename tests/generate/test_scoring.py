"""Log-probabilities of known texts, against those of whole-sequence logits."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import jax_epmoe as ep
from jax_epmoe.generate import scoring
from jax_epmoe.generate.scoring import Scorer

CONFIG = {
    "model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 64, "num_experts": 8,
    "num_experts_per_tok": 2, "num_hidden_layers": 2, "mlp_only_layers": [0], "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 99, "max_position_embeddings": 48, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return lambda mesh, **kwargs: ep.dummy_model(folder, mesh=mesh, dtype="float32", **kwargs)


@pytest.fixture(scope="module")
def model(make):
    return make(ep.make_mesh())


@pytest.fixture(scope="module")
def logits(model):
    """Of one sequence, padded on the right to a single shape."""
    graphdef, state = nnx.split(model)
    whole = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens))

    def of(tokens):
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(tokens)] = tokens
        return np.asarray(whole(state, padded), np.float64)[0, : len(tokens)]

    return of


def requests(seed, count):
    """Of few shapes: short continuations, a question with five letters, a text after its first token."""
    random = np.random.default_rng(seed)
    pairs = [
        (
            random.integers(0, 99, random.integers(1, 13)).tolist(),
            random.integers(0, 99, random.integers(2, 5)).tolist(),
        )
        for _ in range(count)
    ]
    question, text = (random.integers(0, 99, n).tolist() for n in (12, 20))
    return [*pairs, *((question, [letter]) for letter in range(5)), (text[:1], text[1:])]


def expected(logits, context, continuation):
    of = logits([*context, *continuation[:-1]])[len(context) - 1 :]
    shifted = of - of.max(axis=1, keepdims=True)
    logprobs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logprobs[range(len(continuation)), continuation].sum(), of.argmax(axis=1).tolist() == list(continuation)


def test_scores_are_those_of_whole_sequence_logits(model, logits, monkeypatch):
    monkeypatch.setattr(scoring, "_LOGITS_BYTES", 4 * 99 * 4 * 2)  # chunks of few positions
    asked = requests(0, 12)
    question = asked[-2][0]
    asked.append((question, [int(logits(question)[-1].argmax())]))
    told = []
    scores = Scorer(model, batch_tokens=64).score(asked, progress=told.append)
    assert sum(told) == len(asked)
    for i, ((context, continuation), score) in enumerate(zip(asked, scores, strict=True)):
        logprob, is_greedy = expected(logits, context, continuation)
        assert score.logprob == pytest.approx(logprob, abs=1e-3), i
        assert score.is_greedy == is_greedy, i
    assert scores[-1].is_greedy


def test_requests_that_read_the_same_tokens_are_read_once():
    rows = scoring._rows([([1, 2], [3]), ([1, 2], [4]), ([1], [2, 5]), ([1, 2], [3, 4]), ([1, 2], [3, 9])])
    assert [(row.tokens, row.count, row.places) for row in rows] == [
        ((1, 2), 1, [0, 1]),
        ((1, 2), 2, [2]),
        ((1, 2, 3), 2, [3, 4]),
    ]


def test_what_cannot_be_scored_is_refused(model):
    scorer = Scorer(model)
    for request, message in (
        (([], [1]), r"requests\[0\] is \(\[\], \[1\]\); it should be two parts, not empty"),
        (([1], []), "it should be two parts, not empty"),
        (([1] * 40, [1] * 10), r"requests\[0\]: number of tokens is 50; it should be at most 49"),
        (([1], [99]), r"requests\[0\]: token id is 99; it should be from 0 to 98"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.score([request])
    with pytest.raises(ValueError, match="batch_tokens is 0; it should be a positive integer"):
        Scorer(model, batch_tokens=0)


@pytest.mark.slow
@pytest.mark.parametrize("dp_attention", [False, True])
def test_every_mesh_gives_the_same_scores(model, make, dp_attention):
    mesh = ep.make_mesh(4, 4, 1) if dp_attention else ep.make_mesh(2, 2, 2)
    asked = requests(1, 6)
    alone, split = (Scorer(m).score(asked) for m in (model, make(mesh, dp_attention=dp_attention)))
    np.testing.assert_allclose([s.logprob for s in split], [s.logprob for s in alone], atol=1e-3)
    assert [s.is_greedy for s in split] == [s.is_greedy for s in alone]
