"""`epmoe-plan`'s numbers beside the compiled programs' own, on CPU devices in float32, and its command line."""

import dataclasses
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_epmoe import make_mesh, sizing_cli
from jax_epmoe.checkpoint import abstract_model, parameter_shapes
from jax_epmoe.config import ClampedSwiGLU, GQAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from jax_epmoe.generate.batching import make_shapes
from jax_epmoe.generate.engine import Engine
from jax_epmoe.generate.programs import Call
from jax_epmoe.models.families import read_config
from jax_epmoe.models.kv_cache import cache_dtype
from jax_epmoe.sizing import Gpu, Layout, Sizes, Step, plan, plans

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "bench" / "configs"
SIZES = Sizes(max_batch_size=16, context_length=512, prefill_chunk=128)


def random_model(kind: str, seed: int = 0) -> ModelConfig:
    """A small model of random sizes, none of which a mesh need divide but heads and experts."""
    rng = np.random.default_rng((seed, *kind.encode()))
    draw = lambda low, high: int(rng.integers(low, high))  # noqa: E731
    hidden = 8 * draw(24, 48)
    if kind == "deepseek":
        attention = MLAConfig(16, 8 * draw(5, 10), 8 * draw(3, 6), 16, 8 * draw(3, 6), q_lora_rank=8 * draw(8, 14))
        moe = MoEConfig(
            hidden, draw(90, 160), 32, 4, scoring="sigmoid", correction_bias=True, n_group=4, topk_group=2,
            group_score="top2_sum", shared_intermediate_size=draw(90, 160),
        )  # fmt: skip
    elif kind == "gpt_oss":
        attention = GQAConfig(16, 8, 8 * draw(3, 6), sliding_window=32, qkv_bias=True, o_bias=True, sinks=True)
        moe = MoEConfig(
            hidden, draw(300, 600), 8, 2, activation=ClampedSwiGLU(), norm_topk_prob=True,
            router_bias=True, expert_bias=True,
        )  # fmt: skip
    elif kind == "qwen":
        attention = GQAConfig(16, 2, 8 * draw(4, 9), qk_norm="head")
        moe = MoEConfig(hidden, draw(60, 120), 64, 8, norm_topk_prob=True)
    else:
        attention = GQAConfig(16, 8, 8 * draw(3, 6), qk_norm="full" if kind == "olmoe" else None)
        moe = MoEConfig(hidden, draw(300, 600), 8, 2, norm_topk_prob=True)
    return ModelConfig(
        vocab_size=draw(2000, 6000), hidden_size=hidden, attention=attention, rope=RopeConfig(), moe=moe,
        moe_layers=(False, True, True) if kind == "deepseek" else (True, True), dense_intermediate_size=draw(400, 900),
        sliding_layers=(True, False) if kind == "gpt_oss" else (),
    )  # fmt: skip


def abstract_decoder(config: ModelConfig, layout: Layout, dtype=jnp.float32):
    mesh = make_mesh(layout.tp_size, layout.ep_size, layout.dp_size)
    return nnx.merge(*abstract_model(config, mesh, jnp.dtype(dtype), "xla", layout.dp_attention))


def local_bytes(tree) -> int:
    return sum(math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def programs(config: ModelConfig, layout: Layout, sizes: Sizes):
    """The engine's own prefill call and decode step, compiled without weights in float32, one after the other."""
    model = abstract_decoder(config, layout)
    engine = Engine(model, **vars(sizes))
    longest = sizes.context_length - 12
    requests = engine.requests([[1] * (longest - i) for i in range(sizes.max_batch_size)])
    shapes = make_shapes(requests, engine.limits, sizes.max_batch_size)
    rows = plan(config, layout, sizes, jnp.float32).prefill_rows
    assert (shapes.slots, shapes.cache_length) == (sizes.max_batch_size, sizes.context_length)
    assert shapes.chunks == ((sizes.prefill_chunk, (rows,)),)
    for call in (Call("continue", rows, sizes.prefill_chunk), Call("decode", length=1)):
        yield engine.programs(shapes, call)


_ELEMENT = {"f32": 4, "s32": 4, "u32": 4, "pred": 1}
_ARRAY = re.compile(rf"({'|'.join(_ELEMENT)})\[([\d,]*)\]")
_COLLECTIVE = re.compile(
    r"= (\S+(?: \S+)*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def collectives(program, devices: int) -> Counter:
    """Bytes of the whole arrays that the compiled program sends around, by kind."""
    found: Counter = Counter()
    for shapes, kind in _COLLECTIVE.findall(program.as_text()):
        size = sum(
            _ELEMENT[dtype] * math.prod(map(int, filter(None, d.split(",")))) for dtype, d in _ARRAY.findall(shapes)
        )
        found[kind] += size * (devices if kind == "reduce-scatter" else 1)
    return found


CASES = [
    ("gpt_oss", Layout(4, 2, 2)),
    ("deepseek", Layout(8, 4, dp_attention=True)),
    ("mixtral", Layout(8, 2)),
    ("mixtral", Layout(4, 4, 2)),
    ("olmoe", Layout(4, 2, 2)),
    ("deepseek", Layout(8, 8)),
    ("qwen", Layout(8, 8)),
    ("qwen", Layout(4, 1, 2)),
    ("qwen", Layout(8, 8, dp_attention=True)),
]


def measure(config: ModelConfig, layout: Layout, sizes: Sizes) -> list[dict]:
    """Bytes of the two programs by XLA's account: arguments, temporaries, outputs that are no donated argument, collectives."""
    found = []
    for program in programs(config, layout, sizes):
        memory = program.memory_analysis()
        found.append(
            {
                "arguments": memory.argument_size_in_bytes,
                "temporaries": memory.temp_size_in_bytes,
                "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
                "collectives": collectives(program, layout.tp_size),
            }
        )
    return found


def run(code: str, flags: str):
    """What Python code prints, as JSON, in a process with these XLA flags."""
    result = subprocess.run(
        [sys.executable, "-c", f"import json, test_sizing\n{code}"],
        cwd=Path(__file__).parent,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def measured(config: str, layout: Layout, sizes: Sizes) -> list[dict]:
    """`measure`, in a process of its own, of the model that the code `config` makes. XLA's CPU backend usually begins all that it can
    at once, zeros and transposes of all layers, and takes memory for speed; in this process it does not. Its machine code is made
    fast rather than to be fast, which changes no buffer."""
    flags = (
        f"--xla_force_host_platform_device_count={layout.dp_size * layout.tp_size} "
        "--xla_cpu_enable_concurrency_optimized_scheduler=false "
        "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
    )
    code = f"from test_sizing import *\nprint(json.dumps(measure({config}, {layout}, {sizes})))"
    return run(code, flags)


def taken_by_cpus(config: ModelConfig, layout: Layout, sequences: int, length: int) -> int:
    """Bytes that a GPU's program does not take: what the loops of the reference grouped GEMM begin with, zeros of which XLA keeps a
    copy from the first layer to the last, and a layer's attention weights turned round for its matrix product."""
    inner = -(-config.moe.intermediate_size * layout.ep_size // layout.tp_size)
    pairs = sequences // layout.dp_size * length * config.moe.top_k
    attention = plan(config, layout, SIZES, jnp.float32).weights["attention"] // config.num_layers
    return 4 * pairs * (config.hidden_size + inner) + attention


def check(config: ModelConfig, layout: Layout, sizes: Sizes, measured: list[dict]):
    planned = plan(config, layout, sizes, jnp.float32)
    held = sum(planned.weights.values()) + planned.cache
    # What the engine keeps of each slot beside the cache, and is told of each row.
    state = 128 * sizes.max_batch_size + 256
    calls = (planned.prefill, planned.prefill_rows, sizes.prefill_chunk), (planned.decode, sizes.max_batch_size, 1)
    for (step, sequences, length), found in zip(calls, measured, strict=True):
        inputs = 4 * sequences * length + state
        assert held <= found["arguments"] <= held + inputs
        assert inputs < 0.01 * held

        # With data-parallel attention XLA may deal greedy sampling's argmax out by rows, and gather its iota [B, vocab].
        iota = 4 * sequences * config.vocab_size if layout.dp_attention else 0
        assert found["collectives"].keys() == step.collectives.keys()
        for kind, size in step.collectives.items():
            assert size <= found["collectives"][kind] <= size + state + iota, kind

        bound = step.activations + taken_by_cpus(config, layout, sequences, length) + iota
        assert 0.4 * step.activations <= found["temporaries"] <= bound


@pytest.mark.parametrize(
    ("kind", "layout"),
    [*CASES[:2], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[2:])],
    ids=[f"{kind} {layout.flags}" for kind, layout in CASES],
)
def test_bytes_are_those_of_the_compiled_programs(kind, layout):
    check(random_model(kind), layout, SIZES, measured(f"random_model({kind!r})", layout, SIZES))


REAL = [
    ("olmoe-1b-7b", Layout(8, 8), Sizes(64, 1024, 512)),
    ("qwen3-30b-a3b", Layout(8, 8), Sizes(64, 4096, 512)),
    ("deepseek-v2-lite", Layout(8, 8, dp_attention=True), Sizes(64, 4096, 512)),
    ("deepseek-v3", Layout(64, 64), Sizes(64, 4096, 512)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout", "sizes"), REAL, ids=[f"{name} {layout.flags}" for name, layout, _ in REAL])
def test_a_real_model_s_total_is_within_5_percent_of_the_compiled_programs(name, layout, sizes):
    """All layers at their real sizes, abstract, in float32 on CPU devices: the engine's prefill call and decode step, each by itself.

    Planned: weights, cache and the call's activations. Compiled: arguments (weights, cache, and what the engine tells a call
    and keeps of its sequences), temporaries, and outputs less those that take a donated argument's place (the cache). Nothing of the CPU's own is
    taken off. In prefill activations are at least a tenth of the total: an estimate that were wrong by more than half would fail. Each part is
    checked as the small models' are, too.
    """
    config = read_config(CONFIGS / name)
    planned = plan(config, layout, sizes, jnp.float32)
    weights = sum(planned.weights.values())
    calls = ("prefill", planned.prefill), ("decode", planned.decode)
    found = measured(f"read_config(CONFIGS / {name!r})", layout, sizes)
    errors = {}
    for (call, step), program in zip(calls, found, strict=True):
        total = weights + planned.cache + step.activations
        compiled = program["arguments"] + program["temporaries"] + program["outputs"]
        errors[call] = total / compiled - 1
        print(
            f"{name} {layout.flags} {call}, GB: weights {weights / 1e9:.3f}, cache {planned.cache / 1e9:.3f}, activations "
            f"{step.activations / 1e9:.3f}, planned {total / 1e9:.3f}, compiled {compiled / 1e9:.3f}, error {errors[call]:+.2%}"
        )
    assert planned.prefill.activations > 0.1 * planned.total
    assert max(map(abs, errors.values())) < 0.05, errors
    check(config, layout, sizes, found)


@pytest.mark.parametrize("layout", [Layout(4, 2, 2), Layout(8, 8, dp_attention=True)], ids=lambda layout: layout.flags)
@pytest.mark.parametrize(("dtype", "kv_cache_dtype"), [("bfloat16", "auto"), ("float32", "auto"), ("bfloat16", "fp8")])
def test_weights_and_cache_are_those_of_the_whole_model(layout, dtype, kv_cache_dtype):
    config = random_model("deepseek").replace(moe_layers=(False, True, True, False, True, True, True))
    model = abstract_decoder(config, layout, dtype)
    planned = plan(config, layout, SIZES, dtype, kv_cache_dtype)
    assert sum(planned.weights.values()) == local_bytes(nnx.state(model))
    cached = cache_dtype(kv_cache_dtype, model.dtype)
    caches = [layer.attention.abstract_cache(16, 512, cached) for layer in model.layers]
    assert planned.cache == local_bytes(caches)
    assert planned.weights["experts"] == sum(
        local_bytes([layer.moe.w_gate_up.get_value(), layer.moe.w_down.get_value()])
        for layer in model.layers
        if layer.has_experts
    )


def test_biases_and_sinks_count_where_they_lie():
    config, layout = random_model("gpt_oss"), Layout(4, 2, 2)
    planned = plan(config, layout, SIZES)
    plain = plan(
        config.replace(
            attention=dataclasses.replace(config.attention, qkv_bias=False, o_bias=False, sinks=False),
            moe=dataclasses.replace(config.moe, router_bias=False, expert_bias=False),
        ),
        layout,
        SIZES,
    )
    hidden, head_dim = config.hidden_size, config.attention.head_dim
    of_a_device = -(-config.moe.intermediate_size // 2)
    assert {part: planned.weights[part] - plain.weights[part] for part in planned.weights} == {
        "attention": 2 * 2 * ((4 + 2 + 2) * head_dim + 4 + hidden),  # 16 query heads and 8 KV heads over 4 devices
        "experts": 2 * 2 * 4 * (2 * of_a_device + hidden),  # 4 experts, each on 2 devices
        "shared_and_dense": 2 * 4 * config.moe.num_experts,  # the router's, in float32
        "embedding_and_head": 0,
    }
    assert planned.decode.flops == plain.decode.flops


def test_a_cache_made_is_the_cache_foreseen():
    model = abstract_decoder(random_model("qwen"), Layout(4, 2, 2))
    layer = model.layers[0].attention
    for made, foreseen in zip(
        layer.init_cache(4, 8, jnp.float32), layer.abstract_cache(4, 8, jnp.float32), strict=True
    ):
        assert (made.shape, made.dtype, made.sharding) == (foreseen.shape, foreseen.dtype, foreseen.sharding)


def test_a_batch_is_rounded_up_to_the_devices_that_share_it():
    config, eight = random_model("qwen"), Layout(8, 8, dp_attention=True)
    one, eight_of_them, nine = (plan(config, eight, Sizes(batch, 512, 128)).cache for batch in (1, 8, 9))
    assert one == eight_of_them == nine / 2


def test_a_token_on_one_device_costs_two_operations_a_weight_that_it_meets():
    config = random_model("mixtral")
    moe, attention, hidden = config.moe, config.attention, config.hidden_size
    step = plan(config, Layout(), Sizes(1, 100, 10)).decode
    expert, head_dims = 3 * hidden * moe.intermediate_size, attention.head_dim * hidden
    layer = head_dims * (16 + 8 + 8 + 16) + hidden * moe.num_experts + moe.top_k * expert
    scores = 2 * 16 * attention.head_dim * 100
    assert step.flops == 2 * (2 * (layer + scores) + hidden * config.vocab_size)
    assert step.collectives == {}
    assert step.sent == 0

    norms, router = 2 * 2 * hidden, 4 * hidden * moe.num_experts
    read = 2 * (layer - hidden * moe.num_experts) + router + norms
    cache = 2 * 2 * 8 * attention.head_dim * (100 + 1)  # read, and one position written
    assert step.bytes == 2 * (read + cache) + 2 * hidden * (1 + 1 + config.vocab_size)


def test_a_floor_is_the_slower_of_products_and_memory_and_then_the_links():
    gpu = Gpu(memory=1, dense_rate=10, copy_rate=4, link_rate=2)
    step = Step(activations=0, flops=40, bytes=8, collectives={}, sent=6)
    assert step.floor_seconds(gpu) == 40 / 10 + 6 / 2
    assert Step(0, 40, 80, {}, 0).floor_seconds(gpu) == 80 / 4


def test_every_layout_that_the_heads_and_experts_allow_is_tried_once():
    config = random_model("mixtral").replace(attention=GQAConfig(12, 4, 16))
    found = [plan.layout for plan in plans(config, 8, SIZES)]
    plain = [Layout(1, 1, 8), Layout(2, 1, 4), Layout(2, 2, 4), *(Layout(4, ep, 2) for ep in (1, 2, 4))]
    assert found == plain + [Layout(8, ep, dp_attention=True) for ep in (1, 2, 4, 8)]  # 8 does not divide 12 heads


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        pytest.param("deepseek-v3", 671.0, marks=pytest.mark.slow),
        ("deepseek-v2-lite", 15.7),
        pytest.param("qwen3-30b-a3b", 30.5, marks=pytest.mark.slow),
        pytest.param("mixtral-8x7b", 46.7, marks=pytest.mark.slow),
        ("gpt-oss-20b", 20.9),
        pytest.param("gpt-oss-120b", 116.8, marks=pytest.mark.slow),
    ],
)
def test_the_configs_in_bench_have_as_many_parameters_as_is_published(name, billions):
    shapes = parameter_shapes(read_config(CONFIGS / name))
    assert round(sum(math.prod(array.shape) for array in shapes.values()) / 1e9, 1) == billions


DEEPSEEK_V3 = [Layout(8, 8), Layout(16, 16, dp_attention=True), Layout(64, 64)]


def measure_deepseek_v3(layout: Layout) -> int:
    """Bytes of the arguments of a decode step of 64 sequences, beside a token and a position of each."""
    model = abstract_decoder(read_config(CONFIGS / "deepseek-v3"), layout, jnp.bfloat16)
    graphdef, state = nnx.split(model)
    cache = [layer.attention.abstract_cache(64, 4096, jnp.bfloat16) for layer in model.layers]

    def step(state, cache, tokens, start):
        model = nnx.merge(graphdef, state)
        hidden, cache = model.hidden(tokens, start, cache)
        return model.logits(hidden[:, -1]), cache

    rows = [
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(model.mesh, jax.P()))
        for shape in ((64, 1), (64,))
    ]
    lowered = jax.jit(step, donate_argnums=1).lower(state, cache, *rows)
    program = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return program.memory_analysis().argument_size_in_bytes - 64 * (4 + 4)


@pytest.mark.slow
def test_deepseek_v3_in_full_takes_what_its_compiled_decode_step_does():
    code = "print(json.dumps([test_sizing.measure_deepseek_v3(layout) for layout in test_sizing.DEEPSEEK_V3]))"
    found = run(code, "--xla_force_host_platform_device_count=64")
    config = read_config(CONFIGS / "deepseek-v3")
    planned = [plan(config, layout, Sizes(64, 4096, 512)) for layout in DEEPSEEK_V3]
    assert found == [sum(one.weights.values()) + one.cache for one in planned]


def epmoe_plan(capsys, *arguments) -> tuple[int, str, str]:
    status = sizing_cli.main([*map(str, arguments)])
    return status, *capsys.readouterr()


QWEN = ("--model", CONFIGS / "qwen3-30b-a3b")


def test_what_fits_is_printed_best_first(capsys):
    status, out, err = epmoe_plan(capsys, *QWEN, "--gpus", 2)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[:4] for line in lines[5:8]] == [
        ["2", "2", "1", "-"],
        ["2", "1", "1", "-"],
        ["2", "2", "1", "yes"],
    ]
    assert lines[-1] == "best: epmoe-generate --tp-size 2 --ep-size 2"
    assert "1 more do not fit" in lines  # a whole copy on each


@pytest.mark.parametrize("by", ["decode", "prefill"])
def test_json_has_every_layout_in_the_order_asked_for(capsys, by):
    _, out, _ = epmoe_plan(capsys, *QWEN, "--gpus", 8, "--gpu", "h200", "--by", by, "--json", "--dtype", "float32")
    result = json.loads(out)
    floors = [one[by]["floor_seconds"] for one in result["plans"] if one["fits"]]
    assert len(floors) > 5
    assert all(a <= b * 1.01 for a, b in itertools.pairwise(floors))
    fits = [one["fits"] for one in result["plans"]]
    assert fits == sorted(fits, reverse=True)
    assert all(one["fits"] == (one["total"] <= result["gpu"]["memory"]) for one in result["plans"])
    assert result["gpu"]["dense_rate"] == 67e12


def test_one_line_says_what_is_missing_when_nothing_fits(capsys):
    status, out, err = epmoe_plan(capsys, "--model", CONFIGS / "deepseek-v3")
    assert (status, out) == (1, "")
    assert re.fullmatch(
        r"epmoe-plan: nothing fits: --tp-size 8 --ep-size 8 needs least, [\d.]+ GiB a device \(weights 158\.1, cache 8\.6, "
        r"activations [\d.]+\), [\d.]+ more than the 59\.7 that it may use\n",
        err,
    )


def test_the_dtype_of_a_converted_checkpoint_is_its_own(capsys, tmp_path):
    (tmp_path / "config.json").write_text((CONFIGS / "olmoe-1b-7b" / "config.json").read_text())
    (tmp_path / "epmoe.json").write_text('{"format_version": 1, "dtype": "float32"}')
    _, out, _ = epmoe_plan(capsys, "--model", tmp_path, "--json")
    assert json.loads(out)["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "/no/such"], "model folder '/no/such': cannot read config.json: No such file or directory"),
        ([*QWEN, "--gpus", 0], "--gpus is 0; it should be a positive integer"),
        ([*QWEN, "--gpus", "many"], "argument --gpus: invalid int value: 'many'"),
        ([*QWEN, "--link-gbs", -3], "--link-gbs is -3.0; it should be a positive number"),
        ([*QWEN, "--copy-gbs", "nan"], "--copy-gbs is nan; it should be a positive number"),
        ([*QWEN, "--memory-fraction", 1.5], "--memory-fraction is 1.5; it should be more than 0 and at most 1"),
        ([*QWEN, "--max-batch-size", 0], "max_batch_size is 0; it should be a positive integer"),
        ([*QWEN, "--prefill-chunk", -1], "prefill_chunk is -1; it should be a positive integer"),
        ([*QWEN, "--context-length", 40961], "context_length is 40961; it should be at most the model's 40960"),
        ([*QWEN, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ([], "the following arguments are required: --model"),
    ],
)  # fmt: skip
def test_bad_arguments_get_one_line(capsys, arguments, told):
    status, out, err = epmoe_plan(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"epmoe-plan: error: {told}")
    assert err.count("\n") == 1
