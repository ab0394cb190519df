"""The Hopper backend on a Hopper GPU: the suite that every backend passes, chosen tilings at real sizes, the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernels.grouped_gemm_suite import GroupedGemmSuite, Shape

from jax_epmoe import grouped_gemm
from jax_epmoe.kernels.grouped_gemm import hopper

pytestmark = pytest.mark.skipif(not hopper.on_hopper(), reason="needs a Hopper GPU")


class TestHopper(GroupedGemmSuite):
    backend = "hopper"
    shape = Shape(rows=80, experts=6, n=64, k=128, tokens=20)  # the gradient of x reads w transposed: 64 divides k


def make_case(rows, experts, k, n, gated, load):
    random = np.random.default_rng(0)
    sizes = {
        "uneven": random.multinomial(rows, random.dirichlet(np.full(experts, 0.5))),
        "one": rows * np.eye(experts, dtype=np.int32)[experts // 2],
        "half": random.multinomial(rows // 2, np.full(experts, 1 / experts)),  # the other rows belong to nobody
    }[load]
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (rows, k), jnp.bfloat16)
    w = (jax.random.normal(keys[1], (experts, 2, n, k) if gated else (experts, n, k)) * k**-0.5).astype(jnp.bfloat16)
    return x, w, jnp.asarray(sizes, jnp.int32)


def sampled_error(out, x, w, sizes, gated) -> float:
    """Norm-relative error of some rows, the first and last of each group among them."""
    sizes = np.asarray(sizes)
    expert_of_row = np.repeat(np.arange(len(sizes)), sizes)
    ends = np.cumsum(sizes)
    edges = np.concatenate([(ends - 1)[sizes > 0], (ends - sizes)[sizes > 0]])
    rows = np.unique(np.concatenate([edges, np.random.default_rng(1).integers(0, len(expert_of_row), 16)]))[:80]
    errors, norms = 0.0, 0.0
    for row in rows:
        weights, values = w[int(expert_of_row[row])].astype(jnp.float32), x[int(row)].astype(jnp.float32)
        expected = jnp.matmul(weights, values, precision="highest")
        if gated:
            expected = jax.nn.silu(expected[0]) * expected[1]
        errors += float(jnp.sum(jnp.square(out[int(row)].astype(jnp.float32) - expected)))
        norms += float(jnp.sum(jnp.square(expected)))
    return (errors / norms) ** 0.5


@pytest.mark.parametrize("load", ["uneven", "one", "half"])
@pytest.mark.parametrize(
    ("rows", "experts", "k", "n", "gated"),
    [
        (6144, 20, 5120, 1536, True),
        (6152, 20, 1536, 5120, False),
        (8192, 16, 192, 5120, False),
        (8192, 8, 2048, 1536, False),
        (512, 64, 2048, 1024, True),
        (192, 20, 5120, 1536, True),
        (768, 20, 1536, 5120, False),
        (8, 64, 1024, 2048, False),
    ],
)
def test_chosen_tilings_are_right_at_real_sizes_under_skewed_loads(rows, experts, k, n, gated, load):
    x, w, sizes = make_case(rows, experts, k, n, gated, load)
    run = jax.jit(lambda x, w, s: grouped_gemm(x, w, s, activation="silu" if gated else None, backend="hopper"))
    poison = jnp.full((rows, n), jnp.nan, jnp.bfloat16)  # memory that the output may reuse
    poison.delete()
    out = run(x, w, sizes)
    assert sampled_error(out, x, w, sizes, gated) < 5e-3
    valid = int(sizes.sum())
    assert bool(jnp.all(jnp.isfinite(out[:valid].astype(jnp.float32))))
    again = run(x, w, sizes)
    assert bool(jnp.all(out[:valid] == again[:valid])), "the same input gave other bits"
