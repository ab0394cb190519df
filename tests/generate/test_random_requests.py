"""Requests of every kind through few slots, against answers that were made one by one, without an engine."""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
import pytest

from jax_epmoe.generate import Completion, Engine, SamplingParams
from jax_epmoe.generate.sampling import penalize, request_keys, sample

VOCAB, EOS = 97, 96  # HashModel's


def detokenize(prompt, ids):
    """A letter a token, but for the last ones, which have none."""
    return "".join(chr(ord("a") + i % 26) for i in ids if i < 90)


@partial(jax.jit, static_argnames="method")
def choose(logits, seen, penalty, temperature, top_k, top_p, min_p, seed, draw, step, *, method):
    keys = request_keys(seed, draw)
    return sample(penalize(logits, seen, penalty), temperature, top_k, top_p, min_p, keys, step, method=method)


def answer(prompt, params: SamplingParams, draw: int, context: int) -> Completion:
    """What HashModel says after `prompt`, token by token."""
    tokens, made, logprobs = list(prompt), [], []
    weights = np.arange(context) * 31 + 7
    reason, stop_reason = None, None
    of = [np.array([v], t) for v, t in (
        (params.repetition_penalty, np.float32), (params.temperature, np.float32), (params.top_k, np.int32),
        (params.top_p, np.float32), (params.min_p, np.float32), (params.seed, np.uint32), (draw, np.uint32),
    )]  # fmt: skip
    while reason is None:
        hashed = int(np.sum((np.array(tokens) + 3) * (weights[: len(tokens)] % 89)) % VOCAB)
        logits = np.float32(-0.05) * ((np.arange(VOCAB) - hashed) % VOCAB).astype(np.float32)
        seen = np.isin(np.arange(VOCAB), tokens)
        step = np.array([len(made)], np.int32)
        token = int(choose(logits[None], seen[None], *of, step, method="filtered")[0])
        tokens.append(token)
        made.append(token)
        log = logits - np.log(np.sum(np.exp(logits.astype(np.float64))))
        likeliest = np.argsort(-logits, kind="stable")[: params.logprobs or 0]
        logprobs.append({token: log[token], **{int(i): log[i] for i in likeliest}})
        text = detokenize(prompt, made)
        found = [(text.find(string), string) for string in params.stop if string in text]
        if found:
            reason, stop_reason = "stop", min(found)[1]
        elif token in params.stop_token_ids or (token == EOS and not params.ignore_eos):
            reason, stop_reason = "stop", token if token in params.stop_token_ids else None
        elif len(made) == params.max_new_tokens or len(tokens) == context:
            reason = "length"
    return Completion(made, reason, len(prompt), None if params.logprobs is None else logprobs, stop_reason)


@dataclass(frozen=True)
class Case:
    prompt: list[int]
    params: SamplingParams


def random_case(rng: np.random.Generator, beginnings: list[list[int]]) -> Case:
    draw = lambda low, high: int(rng.integers(low, high))  # noqa: E731
    maybe = lambda p, value, default: value if rng.random() < p else default  # noqa: E731
    beginning = beginnings[draw(0, len(beginnings))][: draw(0, 80)] if rng.random() < 0.5 else []
    prompt = [*beginning, *rng.integers(0, VOCAB, draw(1, 40)).tolist()]
    letters = [chr(ord("a") + draw(0, 26)) for _ in range(4)]
    return Case(prompt, SamplingParams(
        temperature=maybe(0.6, float(rng.choice([0.3, 1.0, 3.0])), 0.0),
        top_k=maybe(0.3, draw(1, 40), 0),
        top_p=maybe(0.3, float(rng.uniform(0.2, 1)), 1.0),
        min_p=maybe(0.3, float(rng.uniform(0, 0.5)), 0.0),
        repetition_penalty=maybe(0.3, float(rng.uniform(0.5, 2)), 1.0),
        seed=maybe(0.5, draw(0, 2**32), 0),
        max_new_tokens=maybe(0.2, draw(1, 4), draw(1, 40)),
        stop=maybe(0.2, ("".join(letters[:2]), letters[2]), ()),
        stop_token_ids=maybe(0.3, rng.integers(0, VOCAB, draw(1, 7)).tolist(), ()),
        ignore_eos=bool(rng.random() < 0.5),
        logprobs=maybe(0.2, draw(0, 6), None),
    ))  # fmt: skip


def check(engine: Engine, count: int, seed: int) -> None:
    """The engine itself refuses to end a run with a slot that is not free."""
    rng = np.random.default_rng(seed)
    beginnings = [rng.integers(0, VOCAB, 80).tolist() for _ in range(3)]
    cases = [random_case(rng, beginnings) for _ in range(count)]
    prompts, params = [case.prompt for case in cases], [case.params for case in cases]
    told = []
    got = engine.generate(prompts, params, progress=lambda *counts: told.append(counts))
    for i, (case, completion) in enumerate(zip(cases, got, strict=True)):
        expected = answer(case.prompt, case.params, i, engine.context_length)
        assert (completion.token_ids, completion.finish_reason, completion.stop_reason) == (
            expected.token_ids, expected.finish_reason, expected.stop_reason,
        ), (i, case)  # fmt: skip
        assert (completion.logprobs is None) == (expected.logprobs is None)
        for one, other in zip(completion.logprobs or (), expected.logprobs or (), strict=True):
            assert one.keys() == other.keys(), (i, case)
            np.testing.assert_allclose([one[k] for k in other], list(other.values()), rtol=1e-5, atol=1e-5)
    assert np.sum(told, axis=0).tolist() == [sum(len(c.token_ids) for c in got), count]
    assert engine.stats.cached_tokens > 4 * count
    assert {"stop", "length"} == {c.finish_reason for c in got}


def engine_of(hash_model, **how) -> Engine:
    sizes = {"max_batch_size": 16, "prefill_chunk": 32, "max_prefill_tokens": 64}
    return Engine(hash_model(2, context=128, eos=(EOS,)), **{**sizes, **how}, detokenize=detokenize)


def test_200_requests_get_the_answers_that_each_gets_alone(hash_model):
    check(engine_of(hash_model), 200, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 7])
def test_5000_requests_get_the_answers_that_each_gets_alone(hash_model, steps):
    check(engine_of(hash_model, num_continuous_decode_steps=steps), 5000, seed=steps)


def test_what_is_aborted_ends_and_changes_no_other(hash_model):
    rng = np.random.default_rng(0)
    prompts = [[*range(40), *rng.integers(0, VOCAB, n).tolist()] for n in rng.integers(1, 60, 30)]
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    engine = engine_of(hash_model, max_batch_size=4)
    so_far, ended = [[] for _ in prompts], {}
    for update in engine.stream_tokens(prompts, params):
        so_far[update.index] += update.token_ids
        if update.completion is not None:
            assert update.index not in ended
            ended[update.index] = update.completion
        if len(so_far[update.index]) > 5 and update.index % 3 == 0:
            engine.abort(update.index)
            engine.abort(29)  # has not begun
            engine.abort(1000)  # is no prompt
    assert sorted(ended) == list(range(30))
    for i, prompt in enumerate(prompts):
        expected = answer(prompt, params, i, 128).token_ids
        if i % 3 == 0:
            assert ended[i].finish_reason == "abort"
            assert so_far[i] == ended[i].token_ids == expected[: len(so_far[i])]
            assert 5 < len(so_far[i]) < 20
        elif i == 29:
            assert ended[i] == Completion([], "abort", len(prompt))
        else:
            assert so_far[i] == ended[i].token_ids == expected
