import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_epmoe import MoEConfig, make_mesh
from jax_epmoe.config import GQAConfig, MLAConfig, ModelConfig, RopeConfig
from jax_epmoe.generate import Completion, Engine, SamplingParams
from jax_epmoe.generate.batching import plan_runs
from jax_epmoe.generate.engine import program_calls
from jax_epmoe.generate.scheduler import Scheduler
from jax_epmoe.models.decoder import Decoder

PROMPTS = [[1, 2, 3], list(range(50)), [5] * 17, [9], [4] * 32, [6] * 33]


def expected(prompt, count):
    """What HashModel says after `prompt`."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum((token + 3) * ((i * 31 + 7) % 89) for i, token in enumerate(tokens)) % 97)
    return tokens[len(prompt) :]


@contextlib.contextmanager
def count_compilations():
    """A list that grows by one with every program XLA compiles."""
    compiled, active = [], True

    def listen(event, duration, **_):
        if active and event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield compiled
    active = False


@pytest.mark.parametrize(
    ("max_batch_size", "prefill_chunk", "dp_size"), [(1, 512, 1), (4, 16, 1), (8, 7, 2), (3, 32, 4)]
)
def test_batches_and_chunks_change_no_text(hash_model, max_batch_size, prefill_chunk, dp_size):
    engine = Engine(hash_model(dp_size), max_batch_size=max_batch_size, prefill_chunk=prefill_chunk)
    completions = engine.generate(PROMPTS, SamplingParams(max_new_tokens=9))
    assert completions == [Completion(expected(p, 9), "length", len(p)) for p in PROMPTS]


def test_each_request_has_its_own_length_and_stop_tokens(hash_model):
    texts = [expected(prompt, 8) for prompt in PROMPTS]
    params = [
        SamplingParams(max_new_tokens=1),
        SamplingParams(max_new_tokens=8, stop_token_ids=(texts[1][2],)),
        SamplingParams(max_new_tokens=8, stop_token_ids=(texts[2][0], 96, 95, 94, 93)),
        SamplingParams(max_new_tokens=5),
        SamplingParams(max_new_tokens=8),
        SamplingParams(max_new_tokens=3, stop_token_ids=(texts[5][2],)),
    ]
    got = Engine(hash_model()).generate(PROMPTS, params)
    assert [len(c.token_ids) for c in got] == [1, 3, 1, 5, 8, 3]
    assert [c.finish_reason for c in got] == ["length", "stop", "stop", "length", "length", "stop"]
    assert [c.token_ids for c in got] == [t[: len(c.token_ids)] for t, c in zip(texts, got, strict=True)]


def test_eos_ends_a_text_unless_it_is_ignored_and_stop_tokens_still_do(hash_model):
    text = expected(PROMPTS[0], 8)
    engine = Engine(hash_model(eos=(text[3],)))
    assert engine.generate(PROMPTS[:1])[0] == Completion(text[:4], "stop", 3)
    ignoring = SamplingParams(max_new_tokens=8, ignore_eos=True)
    assert engine.generate(PROMPTS[:1], ignoring)[0] == Completion(text, "length", 3)
    stopping = ignoring.replace(stop_token_ids=(text[5],))
    assert engine.generate(PROMPTS[:1], stopping)[0] == Completion(text[:6], "stop", 3, stop_reason=text[5])
    assert Engine(hash_model(), eos_token_ids=[text[1]]).generate(PROMPTS[:1])[0] == Completion(text[:2], "stop", 3)


def test_the_contexts_end_cuts_a_text(hash_model):
    engine = Engine(hash_model(context=40), prefill_chunk=16)
    got = engine.generate([[3] * 35, [2] * 39], SamplingParams(max_new_tokens=100))
    assert got == [Completion(expected([3] * 35, 5), "length", 35), Completion(expected([2] * 39, 1), "length", 39)]
    with pytest.raises(ValueError, match=r"^prompts\[0\]: number of tokens is 40; it should be at most 39"):
        engine.generate([[3] * 40])


def test_finished_and_padding_rows_take_no_expert_rows_and_steps_end_soon_after_the_last_row(hash_model):
    seen = []
    texts = [expected(prompt, 30) for prompt in PROMPTS]
    params = [SamplingParams(max_new_tokens=500, stop_token_ids=(text[n],)) for n, text in enumerate(texts)]
    engine = Engine(hash_model(observe=lambda num_tokens: seen.append(np.asarray(num_tokens))), prefill_chunk=16)
    got = engine.generate([p[:12] for p in PROMPTS[:1]] + PROMPTS[1:], params)
    jax.effects_barrier()
    fed = sum(len(p) for p in PROMPTS) + sum(len(c.token_ids) - 1 for c in got)
    assert sum(int(n.sum()) for n in seen) == fed
    # Decode calls are of 4 steps. One that has begun runs to its end, and one more was dispatched before that end was read.
    prefills = engine.stats.prefill_calls
    assert len(seen) <= prefills + 4 * (prefills + 1) + max(len(c.token_ids) for c in got) + 2 * 4


def test_the_same_buckets_compile_nothing_again(hash_model):
    engine = Engine(hash_model(), max_batch_size=4, prefill_chunk=32)
    engine.generate([[1, i] * 10 for i in range(3)], SamplingParams(max_new_tokens=5))
    assert engine.num_programs == 2
    with count_compilations() as compiled:
        engine.generate([[1, i] * 15 for i in range(4)], SamplingParams(max_new_tokens=9, stop_token_ids=(3,)))
        assert engine.stats.compile_seconds < 0.5
        assert (engine.num_programs, len(compiled)) == (2, 0)
        engine.generate([[1, i] * 15 for i in range(4)], SamplingParams(temperature=1.0))  # sampling is another program
    assert engine.num_programs == 4
    assert len(compiled) >= 2


def test_a_warm_engine_compiles_nothing(hash_model):
    """More prompts than slots, of several calls each, with a common beginning: every kind of program."""
    engine = Engine(hash_model(), max_batch_size=4, prefill_chunk=32)
    prompts = [[*range(40), i, *[9] * (i % 3)] for i in range(10)]
    params = SamplingParams(max_new_tokens=6, temperature=0.5)
    engine.warm_up(prompts, params)
    programs = engine.num_programs
    assert {key[0].kind for key in engine.programs.compiled} == {"start", "continue", "decode", "copy"}
    engine.generate([[1]], SamplingParams(max_new_tokens=1))  # what NumPy and JAX make of their own
    with count_compilations() as compiled:
        engine.generate(prompts, params)
    assert (engine.num_programs, len(compiled)) == (programs + 1, 0)
    assert engine.stats.cached_tokens > 0


def test_the_cache_is_donated(hash_model):
    engine = Engine(hash_model())
    caches, make = [], engine.programs.init_cache
    engine.programs.init_cache = lambda *shape: caches.append(make(*shape)) or caches[-1]
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=3))
    assert [leaf.is_deleted() for leaf in jax.tree.leaves(caches[-1])] == [True]


def rows_of_the_cache_that_move(program, shape) -> list[str]:
    """Instructions of a compiled program that make another array of a shard of the cache."""
    dimensions = ",".join(map(str, shape))
    moving = re.compile(rf"= \w+\[{dimensions}\]\S* (?:copy|copy-start|all-gather|transpose|pad|concatenate)\(")
    return [line.strip() for line in program.as_text().splitlines() if moving.search(line)]


def check_that_the_cache_stays(engine: Engine) -> None:
    """Every program of a run writes the cache where it is: donated, without a copy, within its device."""
    prompts = [[*range(40), i] for i in range(20)]
    ((requests, shapes),) = plan_runs(
        engine.requests(prompts, SamplingParams(max_new_tokens=300)), engine.limits, lambda length: 10**9
    )
    leaves = jax.tree.leaves(engine.programs.cache_shape(shapes.slots, shapes.cache_length))
    calls = list(program_calls(Scheduler(requests, shapes, prefix_cache=True)))
    assert {call.kind for call in calls} == {"start", "continue", "decode", "copy"}
    engine.programs.compile(shapes, calls)
    for call in calls:
        program = engine.programs(shapes, call)
        held = 0
        for leaf in leaves:
            shard = leaf.sharding.shard_shape(leaf.shape)
            assert rows_of_the_cache_that_move(program, shard) == [], call
            held += math.prod(shard) * leaf.dtype.itemsize
        assert program.memory_analysis().alias_size_in_bytes >= held, call


def test_no_program_copies_the_cache(hash_model):
    check_that_the_cache_stays(Engine(hash_model(2), max_batch_size=16, prefill_chunk=32, max_prefill_tokens=128))


@pytest.mark.slow
@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("attention", ["gqa", "mla"])
@pytest.mark.parametrize("sizes", [{}, {"tp_size": 2, "dp_size": 2}, {"tp_size": 4, "dp_attention": True}], ids=str)
def test_no_program_of_a_decoder_copies_the_cache(attention, sizes, kv_cache_dtype):
    model = decoder({"gqa": GQA, "mla": MLA}[attention], context=512, **sizes)
    sizes = {"max_batch_size": 16, "prefill_chunk": 32, "max_prefill_tokens": 128}
    check_that_the_cache_stays(Engine(model, kv_cache_dtype=kv_cache_dtype, **sizes))


def test_memory_bounds_the_slots(hash_model, monkeypatch):
    engine = Engine(hash_model(2), max_batch_size=16, prefill_chunk=16)
    monkeypatch.setattr("jax_epmoe.generate.engine.free_memory", lambda devices, fraction: int(2500 * fraction))
    got = engine.generate(PROMPTS * 3, SamplingParams(max_new_tokens=9))
    assert engine.stats.slots == 2 * (int(2500 * 0.85) // (4 * 128))  # int32 tokens at 128 positions, two replicas
    assert got == [Completion(expected(p, 9), "length", len(p)) for p in PROMPTS * 3]


def test_completions_come_as_they_finish_and_tokens_as_they_are_read(hash_model):
    params = [SamplingParams(max_new_tokens=n) for n in (30, 2, 9, 1, 17, 5)]
    engine = Engine(hash_model(), num_continuous_decode_steps=3)
    finished = list(engine.stream(PROMPTS, params))
    assert [index for index, _ in finished] != sorted(index for index, _ in finished)
    assert {i: c.token_ids for i, c in finished} == {
        i: expected(p, n.max_new_tokens) for i, (p, n) in enumerate(zip(PROMPTS, params, strict=True))
    }
    updates = [update for update in engine.stream_tokens(PROMPTS, params) if update.index == 0]
    assert [len(update.token_ids) for update in updates] == [1] + [3] * 9 + [2]
    assert [update.completion is None for update in updates] == [True] * 10 + [False]
    with pytest.raises(ValueError, match=r"^prompts\[0\]: number of tokens is 0"):  # at once, not when it is read
        engine.stream([[]])


def test_the_rows_of_each_expert_are_told_of_every_step(hash_model):
    class Recorder(list):
        add = list.append

    recorder, model = Recorder(), hash_model()
    model.hidden_with_load = lambda *args, **kwargs: (*model.hidden(*args, **kwargs), jnp.sum(args[3])[None, None])
    engine = Engine(model, expert_load=recorder, num_continuous_decode_steps=3)
    engine.generate(PROMPTS, SamplingParams(max_new_tokens=7))
    assert len(recorder) == engine.stats.prefill_calls + engine.stats.decode_steps
    assert sum(int(rows[0, 0]) for rows in recorder) == sum(map(len, PROMPTS)) + 6 * len(PROMPTS)


def test_what_is_left_of_a_list_gets_the_draws_that_it_would_have_had(hash_model):
    wild = SamplingParams(temperature=3.0, max_new_tokens=8)
    engine = Engine(hash_model(), max_batch_size=1, prefill_chunk=16)
    whole = engine.generate(PROMPTS, wild)
    assert engine.generate(PROMPTS[2:4], wild, indices=[2, 3]) == whole[2:4]
    with pytest.raises(ValueError, match=r"^number of indices is 1; it should be 2, one a prompt$"):
        engine.generate(PROMPTS[2:4], wild, indices=[2])


def test_stop_strings_need_a_tokenizer(hash_model):
    with pytest.raises(ValueError, match=r"^stop is \('x',\); it should be empty where there is no tokenizer$"):
        Engine(hash_model()).generate([[1]], SamplingParams(stop="x"))


def test_sampling_depends_on_seed_index_and_position_alone(hash_model):
    wild = SamplingParams(temperature=3.0, top_p=0.95, max_new_tokens=12, seed=5)
    prompts = [[1, 2, 3]] * 5
    alone = Engine(hash_model(), max_batch_size=1).generate(prompts, wild)
    assert len({tuple(c.token_ids) for c in alone}) == 5
    batched = Engine(hash_model(2), max_batch_size=8, prefill_chunk=2).generate(prompts, wild)
    assert batched == alone
    others = [wild, SamplingParams(max_new_tokens=12), wild.replace(seed=6), wild.replace(top_k=9), wild]
    mixed = Engine(hash_model(), max_batch_size=8).generate(prompts, others)
    assert [a == b for a, b in zip(mixed, alone, strict=True)] == [True, False, False, False, True]
    assert mixed[1].token_ids == expected([1, 2, 3], 12)


def test_progress_and_stats_count_every_token(hash_model):
    told = []
    engine = Engine(hash_model(), max_batch_size=2)
    got = engine.generate(PROMPTS, SamplingParams(max_new_tokens=7), progress=lambda *counts: told.append(counts))
    assert np.sum(told, axis=0).tolist() == [42, 6] == [sum(len(c.token_ids) for c in got), len(got)]
    stats = engine.stats
    assert (stats.requests, stats.prompt_tokens, stats.output_tokens) == (6, 136, 42)
    assert min(stats.compile_seconds, stats.prefill_seconds, stats.decode_seconds, stats.first_token_seconds) > 0
    assert stats.memory_bytes > 0
    assert len(stats.summary().splitlines()) == 5


def test_no_prompts_are_no_completions(hash_model):
    engine = Engine(hash_model())
    assert engine.generate([]) == []
    assert engine.stats.tokens_per_second == 0


@pytest.mark.parametrize(
    "name",
    [
        "max_batch_size",
        "prefill_chunk",
        "max_prefill_tokens",
        "context_length",
        "num_continuous_decode_steps",
        "mem_fraction_static",
    ],
)
def test_a_size_out_of_range_is_refused(hash_model, name):
    with pytest.raises(ValueError, match=rf"^{name} is 0; it should be"):
        Engine(hash_model(), **{name: 0})
    with pytest.raises(ValueError, match=r"^number of sampling parameters is 1; it should be 2, one a prompt$"):
        Engine(hash_model()).generate([[1], [2]], [SamplingParams()])


def tiny_config(attention, context=128) -> ModelConfig:
    return ModelConfig(
        vocab_size=61,
        hidden_size=32,
        attention=attention,
        rope=RopeConfig(),
        moe=MoEConfig(hidden_size=32, intermediate_size=16, num_experts=8, top_k=2),
        moe_layers=(False, True),
        dense_intermediate_size=32,
        max_position_embeddings=context,
    )


GQA = GQAConfig(num_heads=4, num_kv_heads=2, head_dim=8)
MLA = MLAConfig(num_heads=4, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)


def decoder(attention, *, context=128, dp_attention=False, **sizes) -> Decoder:
    """Weights of some size, so that the context decides the tokens."""
    config, mesh = tiny_config(attention, context), make_mesh(**sizes)
    model = Decoder(config, mesh=mesh, dtype=jnp.float32, rngs=nnx.Rngs(0), dp_attention=dp_attention)
    nnx.update(model, jax.tree.map(lambda a: a * 8 if a.ndim > 1 else a, nnx.state(model, nnx.Param)))
    return model


# tests/parity has two of the real families in the engine, in `make test`.
@pytest.mark.slow
@pytest.mark.parametrize("attention", [GQA, MLA], ids=["gqa", "mla"])
def test_a_decoder_says_the_same_alone_batched_chunked_and_split(attention):
    long = [n % 61 for n in range(40)]
    prompts = [[7, 3, 9], long, [20, 21, 22, 23], [11] * 12, [60], [*long[:36], 5, 4], [*long[:36], 1]]
    params = SamplingParams(max_new_tokens=8)
    model = decoder(attention)
    forward = jax.jit(lambda tokens: model(tokens))
    tokens = np.zeros((1, 48), np.int32)  # against the forward pass without a cache
    tokens[0, :40] = prompts[1]
    for n in range(40, 48):
        tokens[0, n] = jnp.argmax(forward(tokens)[0, n - 1])
    engine = Engine(model, max_batch_size=1, prefix_cache=False)
    alone = engine.generate(prompts, params)
    assert engine.stats.cached_tokens == 0
    assert alone[1].token_ids == tokens[0, 40:].tolist()
    assert len({token for c in alone for token in c.token_ids}) > 8, "the model says one thing only"
    engine = Engine(model, max_batch_size=4, prefill_chunk=16)  # fewer slots than prompts, and two that copy
    assert engine.generate(prompts, params) == alone
    assert engine.stats.cached_tokens == 64
    split = decoder(attention, tp_size=4, ep_size=2, dp_size=2)
    assert Engine(split, max_batch_size=8, prefill_chunk=16).generate(prompts, params) == alone
