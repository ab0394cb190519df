"""The Hopper kernel without a GPU: interpreted on the CPU with race detection, and lowered for CUDA."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import reset_gpu_interpret_mode_state
from jax.experimental.pallas import mosaic_gpu as plgpu

from jax_epmoe.config import ClampedSwiGLU
from jax_epmoe.kernels.grouped_gemm import grouped_gemm, hopper, reference
from jax_epmoe.kernels.grouped_gemm.tuning import Tiling, choose_tiling


@pytest.fixture(autouse=True)
def pretend_hopper(monkeypatch):
    monkeypatch.setattr(hopper, "on_hopper", lambda: True)
    monkeypatch.setattr(hopper, "num_sms", lambda: 3)  # the interpreter runs one after another
    yield
    reset_gpu_interpret_mode_state()


LOW = Tiling(columns=128, heights=(16, 64), stages=2)
CASES = {
    "one tile height": {"tiling": Tiling(columns=256, heights=(64,), stages=2), "n": 256},
    "the largest height is picked": {
        "tiling": Tiling(columns=128, heights=(16, 32, 64), largest_heights=(64, 48), stages=2), "n": 256,
    },
    "a stage is released late": {"tiling": Tiling(columns=128, heights=(64,), stages=2, lag=True), "k": 192},
    "a gate": {"activation": "silu"},
    "a gate, three consumers": {"activation": "silu", "tiling": Tiling(columns=192, heights=(16, 64), stages=2), "n": 200},
    "three consumers": {"tiling": Tiling(columns=192, heights=(64,), stages=2), "n": 192},
    "another gate, late": {"activation": "gelu_pytorch_tanh", "tiling": Tiling(columns=128, heights=(64,), stages=2, lag=True)},
    "a bias, k and n off the tile": {"bias": True, "k": 112, "n": 200},
    "transposed weights": {"transpose_w": True},
    "transposed, k and n off the tile": {"transpose_w": True, "k": 80, "n": 192},
    "a bias and gpt-oss's gate": {"bias": True, "activation": ClampedSwiGLU(limit=0.8), "n": 200},
    "no rows at all": {"sizes": (0, 0, 0)},
    "one expert has every row": {"sizes": (0, 128, 0)},
    "single rows": {"sizes": (1, 0, 1, 1)},
    "sizes around the tile": {"sizes": (63, 64, 1)},
    "rows that 8 does not divide": {"rows": 61, "sizes": (30, 7, 24)},
    "a gather": {"rows": 40, "sizes": (11, 0, 20), "gather": 19},
    "two output slots": {"tiling": Tiling(columns=256, heights=(64,), stages=2, slots=2), "n": 256},
}  # fmt: skip


def make_inputs(sizes=(37, 0, 70, 5), rows=128, k=128, n=128, activation=None, transpose_w=False, gather=None, **_):
    keys = jax.random.split(jax.random.key(0), 3)
    experts = len(sizes)
    shape = (experts, k, n) if transpose_w else (experts, 2, n, k) if activation else (experts, n, k)
    x = jax.random.normal(keys[0], (gather or rows, k), jnp.bfloat16)
    w = (jax.random.normal(keys[1], shape) * k**-0.5).astype(jnp.bfloat16)
    index = jax.random.randint(keys[2], (rows,), 0, gather) if gather else None
    if not gather:  # rows past the groups may hold anything
        x = x.at[sum(sizes) :].set(jnp.nan)
    return x, w, jnp.array(sizes, jnp.int32), index


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_it_computes_the_definition_without_races(case):
    x, w, sizes, index = make_inputs(**case)
    options = {name: case[name] for name in ("activation", "transpose_w") if name in case}
    if "bias" in case:
        options["bias"] = jax.random.normal(jax.random.key(1), w.shape[:-1], jnp.bfloat16)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        out = hopper.matmul(x, w, sizes, row_index=index, tiling=case.get("tiling", LOW), out_dtype=x.dtype, **options)
        out = np.asarray(out, np.float32)
    expected = reference.matmul(
        x.astype(jnp.float32), w.astype(jnp.float32), sizes, row_index=index, out_dtype=jnp.float32, **options
    )
    valid = int(sizes.sum())
    error = np.linalg.norm(out[:valid] - expected[:valid]) / max(np.linalg.norm(expected[:valid]), 1e-30)
    assert error < 5e-3


@pytest.mark.parametrize(
    ("rows", "experts", "k", "n", "gated"),
    [
        (6144, 20, 5120, 1536, True),  # DeepSeek-Coder-V2, a rank of EP8
        pytest.param(6144, 20, 1536, 5120, False, marks=pytest.mark.slow),
        (49152, 160, 5120, 192, True),  # the same under TP8
        pytest.param(49152, 160, 192, 5120, False, marks=pytest.mark.slow),
        (65536, 128, 2048, 768, True),  # Qwen3-30B-A3B
        (65536, 128, 768, 2048, False),
        (16384, 8, 4096, 14336, True),  # Mixtral
        (512, 64, 2048, 1024, True),  # OLMoE, decoding
        (8, 64, 1024, 2048, False),
        (192, 20, 5120, 1536, True),
        (768, 20, 1536, 5120, False),
    ],
)
def test_chosen_tilings_lower_for_cuda_and_fit_shared_memory(rows, experts, k, n, gated):
    tiling = choose_tiling(rows=rows, experts=experts, n=n, k=k, gated=gated)
    parts = 2 if gated else 1
    stage = (tiling.heights[-1] + parts * tiling.columns) * tiling.block_k
    assert 2 * (tiling.stages * stage + tiling.consumers * tiling.slots * tiling.heights[-1] * 64) <= 226 * 1024, tiling
    w = (experts, 2, n, k) if gated else (experts, n, k)
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, k), w)]
    sizes = jax.ShapeDtypeStruct((experts,), jnp.int32)

    def run(x, w, sizes):
        return hopper.matmul(x, w, sizes, activation="silu" if gated else None, out_dtype=x.dtype)

    jax.jit(run).trace(*shapes, sizes).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("rows", [32, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (4096, 32768))])
@pytest.mark.parametrize("gated", [True, False])
def test_gpt_oss_s_biases_and_its_gate_lower_for_cuda(rows, gated):
    """2880 is no multiple of a tile's columns: the last tile reads past the biases' end."""
    w = jax.ShapeDtypeStruct((32, 2, 2880, 2880) if gated else (32, 2880, 2880), jnp.bfloat16)
    x, bias = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 2880), w.shape[:-1]))

    def run(x, w, sizes, bias):
        activation = ClampedSwiGLU() if gated else None
        return hopper.matmul(x, w, sizes, bias=bias, activation=activation, out_dtype=x.dtype)

    sizes = jax.ShapeDtypeStruct((32,), jnp.int32)
    jax.jit(run).trace(x, w, sizes, bias).lower(lowering_platforms=("cuda",))


def test_tiles_suit_the_rows_that_are_expected_in_both_directions(monkeypatch):
    asked = []
    monkeypatch.setattr(hopper, "choose_tiling", lambda **sizes: asked.append(sizes["rows"]) or choose_tiling(**sizes))
    shapes = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((4096, 128), (4, 128, 128))]
    sizes = jax.ShapeDtypeStruct((4,), jnp.int32)

    def loss(x, w, sizes, **hint):
        return jnp.sum(grouped_gemm(x, w, sizes, backend="hopper", **hint))

    for hint, rows in (({}, 4096), ({"expected_rows": 512}, 512), ({"expected_rows": 10**6}, 4096)):
        asked.clear()
        jax.jit(jax.grad(partial(loss, **hint))).trace(*shapes, sizes)
        assert asked == [rows, rows], hint


def test_both_gradients_lower_for_cuda():
    x, w = jax.ShapeDtypeStruct((6144, 5120), jnp.bfloat16), jax.ShapeDtypeStruct((20, 2, 1536, 5120), jnp.bfloat16)
    sizes = jax.ShapeDtypeStruct((20,), jnp.int32)

    def loss(x, w, sizes):
        return jnp.sum(grouped_gemm(x, w, sizes, activation="silu", backend="hopper"))

    jax.jit(jax.grad(loss, argnums=(0, 1))).trace(x, w, sizes).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": jnp.float32},
        {"out_dtype": jnp.float32},
        {"k": 120},
        {"n": 100},
    ],
    ids=str,
)
def test_what_it_cannot_serve_it_leaves_to_the_next(change):
    dtype = change.get("dtype", jnp.bfloat16)
    x = jnp.zeros((16, change.get("k", 128)), dtype)
    w = jnp.zeros((4, change.get("n", 128), change.get("k", 128)), dtype)
    with pytest.raises(NotImplementedError, match="hopper backend"):
        hopper.matmul(x, w, jnp.array([4, 4, 4, 4]), out_dtype=change.get("out_dtype", dtype))


def test_it_serves_only_hopper(monkeypatch):
    monkeypatch.undo()
    x = jnp.zeros((16, 128), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="not a Hopper"):
        hopper.matmul(x, jnp.zeros((1, 128, 128), x.dtype), jnp.array([16]), out_dtype=x.dtype)
