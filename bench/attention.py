"""A decode step's attention kernels alone on a Hopper GPU, against the bytes that they must move.

    python -m bench.attention                           # all cases
    python -m bench.attention --quick                   # one of each kind
    python -m bench.attention --cases 'gqa-64x*' 'mla*'

`gqa`: a token of each sequence over a cache of keys and values; `mla`: over one of latents; `rope`: what comes before, QK norm,
rotation and the cache's new position. A case is named kind-BxL-heads, then /key heads x dimension where it has them; all
sequences are L long. `float8`: with a float8 cache; `dequantised`: made bfloat16 first, as where the kernel does not serve it;
`xla`: what is done where no kernel serves.

Times are those of a call's kernels (by CUPTI). Bytes are the inputs, the output and the positions of the cache that are read or
written, with their scales, each once; `copy` is their rate over that of a copy, measured here. Consecutive calls have other
arguments, 4 in turn at most: what is small is found in the L2 all the same, as rope's inputs are in a decode step. `error` is by
norms, of a few sequences, against the definition in float32 over the same cache; rope's, of queries and what is cached, against
its definition with the same roundings, of which some fall otherwise.
"""

import argparse
import dataclasses
import fnmatch
import itertools
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from bench import roofline
from bench.environment import environment, require_hopper, result_path
from bench.roofline import failure, number
from bench.timing import ceilings, normal, times
from jax_epmoe.kernels import decode_hopper, mla_hopper, mla_hopper_many_heads, rope_hopper
from jax_epmoe.models import kv_cache
from jax_epmoe.models.attention import attend
from jax_epmoe.models.blocks import rotate
from jax_epmoe.models.kv_cache import Cached, Float8Vectors
from jax_epmoe.tune import UNTUNED

DTYPE = jnp.bfloat16
RANK, LATENT, MLA_DIM = 512, 576, 192  # DeepSeek's: values in a latent, all of it, a query head before it is absorbed
EPS = 1e-6
ROPE_TOLERANCE = 2e-2  # where a rounding to bfloat16 falls otherwise, so may many to float8 after it
_UNCACHED_BYTES = 200e6  # four times the L2
_MOST_COPIES = 4
_LEAST_CALLS = 21

Inputs = tuple[Any, ...]
Cache = list[Any]  # of `kv_cache.Cached`: keys and values, or latents


@dataclasses.dataclass(frozen=True)
class Case:
    """A token of each of `batch` sequences, for which the cache has `length` positions."""

    kind: str  # gqa, mla or rope
    batch: int
    length: int
    heads: int
    kv_heads: int = 1
    dim: int = LATENT
    window: int | None = None

    @property
    def name(self) -> str:
        of_heads = "" if self.kind == "mla" else f"/{self.kv_heads}x{self.dim}"
        window = f"-window-{self.window}" if self.window else ""
        return f"{self.kind}-{self.batch}x{self.length}-{self.heads}{of_heads}{window}"

    @property
    def scale(self) -> float:
        return (MLA_DIM if self.kind == "mla" else self.dim) ** -0.5

    @property
    def out_shape(self) -> tuple[int, int, int]:
        return self.batch, self.heads, RANK if self.kind == "mla" else self.dim

    @property
    def positions(self) -> int:
        """How many of each sequence are read, or by rope written."""
        return 1 if self.kind == "rope" else min(self.length, self.window or self.length)


CASES = (
    Case("gqa", 64, 1024, 32, 4, 128),
    Case("gqa", 64, 4096, 32, 4, 128),
    Case("gqa", 256, 1024, 32, 4, 128),
    Case("gqa", 8, 1024, 32, 4, 128),
    Case("gqa", 1, 32768, 32, 4, 128),
    Case("gqa", 64, 1024, 64, 8, 64),
    Case("gqa", 64, 1024, 32, 2, 128),
    Case("gqa", 64, 8192, 64, 8, 64, window=128),
    Case("mla", 64, 1024, 16),
    Case("mla", 64, 4096, 16),
    Case("mla", 64, 1024, 128),
    Case("mla", 512, 1024, 128),
    Case("mla", 256, 1024, 64),
    Case("mla", 1, 1024, 16),
    Case("rope", 64, 1024, 32, 4, 128),
)


def main() -> None:
    args = _arguments()
    require_hopper("bench.attention")
    run(args)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--cases", nargs="+", metavar="PATTERN", default=["*"], help=f"of {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="of these, the first of each kind")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", default=300, help="start no case after")
    parser.add_argument("--jobs", type=int, default=6, help="programs to compile at a time")
    parser.add_argument("--output", type=Path, help="default: a file in bench/results/ named after the device")
    args = parser.parse_args()
    for pattern in args.cases:
        if not fnmatch.filter(names, pattern):
            parser.error(f"--cases: none matches {pattern}; there are {', '.join(names)}")
    args.cases = [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in args.cases)]
    if args.quick:
        args.cases = [next(of_kind) for _, of_kind in itertools.groupby(args.cases, lambda case: case.kind)]
    args.output = args.output or result_path("attention")
    return args


def run(args: argparse.Namespace) -> None:
    deadline = time.monotonic() + args.time_limit
    result: dict[str, Any] = {"format": 1, **environment()}
    versions = {name: version for name in ("nvidia-cudnn-cu13",) if (version := roofline.version(name))}
    result |= {"peer_versions": versions, "ceilings": ceilings({"failed": "not asked for"}), "cases": []}
    copy_gbs = result["ceilings"]["copy_gbs"]
    todo = [(case, name) for case in args.cases for name in implementations(case)]
    with ThreadPoolExecutor(args.jobs) as pool:  # all before any is timed: XLA tries kernels on the device
        made = tqdm(pool.map(lambda which: compiled(*which), todo), "compiling", len(todo), unit="program")
        programs = dict(zip(todo, made, strict=True))
    for case in tqdm(args.cases, "cases", unit="case"):
        if time.monotonic() > deadline:
            tqdm.write(f"time limit of {args.time_limit:.0f} s: {case.name} and what follows left out")
            break
        results = {name: measure(case, name, programs[case, name], copy_gbs) for name in implementations(case)}
        result["cases"].append({"case": case.name, **dataclasses.asdict(case), "results": results})
        roofline.save(result, args.output)
    print(f"{roofline.head(result)}\n{table(result)}")
    if result["cases"]:
        print(f"wrote {args.output}")


def draw(case: Case, float8: bool, copy: int) -> tuple[Inputs, Cache]:
    """The arguments of a call: its inputs, and the cache, keys and values `[B, L, kv_heads, D]` or latents
    `[B, L, LATENT]`, in float8 in two parts.

    Inputs are `q [B, heads, D]` and `lengths [B]`; of rope `qkv [B, heads + 2 kv_heads, D]` float32, as one product makes them,
    and the rest of what `rope_hopper.rotate_into_cache` takes, but caches.
    """
    seeds = itertools.count()

    def random(*shape: int) -> jax.Array:
        return normal(16 * copy + next(seeds), shape)

    def cached(*shape: int) -> Cached:
        return jax.jit(kv_cache.in_float8)(random(*shape)) if float8 else random(*shape)

    batch, dim, lengths = case.batch, case.dim, jnp.full(case.batch, case.length, jnp.int32)
    if case.kind == "mla":
        parts = (RANK, dim - RANK) if float8 else (dim,)
        return (random(batch, case.heads, dim), lengths), [cached(batch, case.length, part) for part in parts]
    cache = [cached(batch, case.length, case.kv_heads, dim) for _ in range(2)]
    if case.kind == "gqa":
        return (random(batch, case.heads, dim), lengths), cache
    qkv = random(batch, case.heads + 2 * case.kv_heads, dim).astype(jnp.float32)
    angles = random(batch, dim // 2).astype(jnp.float32)
    return (qkv, (jnp.cos(angles), jnp.sin(angles)), lengths - 1, (random(dim), random(dim))), cache


def decode(case: Case, inputs: Inputs, cache: Cache) -> jax.Array:
    (q, lengths), (keys, k_scales), (values, v_scales) = inputs, *map(kv_cache.stored, cache)
    scales = None if k_scales is None or v_scales is None else (k_scales, v_scales)
    return decode_hopper.decode(q, keys, values, lengths, None, scales, scale=case.scale, sliding_window=case.window)


def decode_dequantised(case: Case, inputs: Inputs, cache: Cache) -> jax.Array:
    return decode(case, inputs, [kv_cache.read(each, DTYPE) for each in cache])


def cudnn(case: Case, inputs: Inputs, cache: Cache) -> jax.Array:
    q, lengths = inputs
    of_lengths = {"query_seq_lengths": jnp.ones_like(lengths), "key_value_seq_lengths": lengths}
    library: Callable[..., jax.Array] = jax.nn.dot_product_attention
    return library(q[:, None], *cache, scale=case.scale, implementation="cudnn", **of_lengths)[:, 0]


def decode_latents(case: Case, inputs: Inputs, cache: Cache) -> jax.Array:
    q, lengths = inputs
    return mla_hopper.decode(q, kv_cache.read_latents(tuple(cache), DTYPE), lengths, rank=RANK, scale=case.scale)


def decode_float8_latents(case: Case, inputs: Inputs, cache: Cache) -> jax.Array:
    (q, lengths), (latent, rotated) = inputs, cache
    scales = latent.scales, rotated.scales
    return mla_hopper.decode_float8(q, latent.data, rotated.data, scales, lengths, scale=case.scale)


def attend_in_xla(case: Case, inputs: Inputs, cache: Cache) -> jax.Array:
    (q, lengths), k, v = inputs, cache[0], cache[-1]
    if case.kind == "mla":
        k = jnp.concatenate(cache, axis=-1)[:, :, None]  # one key head for all
        v = k[..., :RANK]
    places = jnp.broadcast_to(jnp.arange(case.length), (len(q), case.length))
    return attend(q[:, None], k, v, lengths[:, None] - 1, places, case.scale, case.window)[:, 0]


def rotate_into_cache(case: Case, inputs: Inputs, cache: Cache) -> tuple[jax.Array, Cache]:
    qkv, table, positions, norms = inputs
    values, scales = zip(*map(kv_cache.stored, cache), strict=True)
    float8 = isinstance(cache[0], Float8Vectors)
    caches = (*values, *scales) if float8 else values
    q, new = rope_hopper.rotate_into_cache(*_split(case, qkv), table, positions, caches, norms, eps=EPS, dtype=DTYPE)
    return q, list(map(Float8Vectors, new[:2], new[2:])) if float8 else list(new)


def rotate_in_xla(case: Case, inputs: Inputs, cache: Cache) -> tuple[jax.Array, Cache]:
    qkv, *others, norms = inputs
    qkv, table, positions = jax.tree.map(lambda array: array[:, None], (qkv, *others))
    q, k, v = _split(case, qkv)

    def rotated(x: jax.Array, norm: jax.Array) -> jax.Array:
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + EPS) * norm.astype(jnp.float32)
        return rotate(x, table, False).astype(DTYPE)

    new = rotated(k, norms[1]), v.astype(DTYPE)
    return rotated(q, norms[0])[:, 0], [kv_cache.write(*pair, positions) for pair in zip(cache, new, strict=True)]


def _split(case: Case, qkv: jax.Array) -> list[jax.Array]:
    return jnp.split(qkv, (case.heads, case.heads + case.kv_heads), axis=-2)


def implementations(case: Case) -> dict[str, Callable[[Case, Inputs, Cache], Any]]:
    """By name, which says whether the cache is `float8`. Rope's are given the cache, and return it after the queries."""
    if case.kind == "mla":
        few = {"float8": decode_float8_latents} if case.heads < mla_hopper_many_heads.HEADS else {}
        return {"ours": decode_latents, **few, "float8 dequantised": decode_latents, "xla": attend_in_xla}
    if case.kind == "rope":
        ways = {"ours": rotate_into_cache, "xla": rotate_in_xla}
        return {**ways, **{f"{name} float8": run for name, run in ways.items()}}
    of_cudnn = {} if case.window else {"float8 dequantised": decode_dequantised, "cudnn": cudnn}
    return {"ours": decode, "float8": decode, **of_cudnn}


def traced(case: Case, name: str) -> jax.stages.Traced:
    arguments = jax.eval_shape(partial(draw, case, "float8" in name, 0))
    donated = 1 if case.kind == "rope" else ()
    return jax.jit(partial(implementations(case)[name], case), donate_argnums=donated).trace(*arguments)


def compiled(case: Case, name: str) -> Any:
    """The program, or why there is none."""
    try:
        return traced(case, name).lower().compile()
    except Exception as error:
        return failure(error)


def measure(case: Case, name: str, program: Any, copy_gbs: float) -> dict[str, Any]:
    """Checks, then times; the arrays are gone when this returns."""
    if isinstance(program, dict):
        return program
    float8, is_rope = "float8" in name, case.kind == "rope"
    moved = bytes_moved(case, float8)
    copies = min(_MOST_COPIES, math.ceil(_UNCACHED_BYTES / moved))

    def call(inputs: Inputs, cache: Cache) -> jax.Array:
        out = program(inputs, cache)
        if is_rope:  # it was given the cache, and the next call needs one
            out, cache[:] = out
        return out

    try:
        arguments = [draw(case, float8, copy) for copy in range(copies)]
        error = error_of(case, call, *arguments[0])
        timed = times(call, arguments, -(-_LEAST_CALLS // copies) * copies)
    except Exception as problem:
        return failure(problem)
    gbs, kernels = moved / timed["device_us"] * 1e-3, timed.get("kernels")
    rates = {"bytes": moved, "gbs": gbs, "share": gbs / copy_gbs}
    return {**timed, "num_kernels": kernels and len(kernels), "copies": copies, **rates, "error": error}


def bytes_moved(case: Case, float8: bool) -> int:
    """Of inputs, of the output, and of the cache's positions that are read or written."""
    inputs, cache = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(arrays))
        for arrays in jax.eval_shape(partial(draw, case, float8, 0))
    )
    return inputs + cache // case.length * case.positions + math.prod(case.out_shape) * jnp.dtype(DTYPE).itemsize


def error_of(case: Case, call: Callable[..., jax.Array], inputs: Inputs, cache: Cache) -> float:
    """By norms, of a few sequences; a `RuntimeError` if not all of the output is finite."""
    few = np.linspace(0, case.batch - 1, min(case.batch, 4)).astype(np.int32)
    expected = np.asarray(_expected(case, few, inputs, cache))  # before rope changes the cache
    jnp.full(case.out_shape, jnp.nan, DTYPE).block_until_ready().delete()  # memory that the output may get
    got = np.asarray(_to_check(case, call(inputs, cache), cache))
    if not np.isfinite(got).all():
        raise RuntimeError("its output is not finite")
    return float(np.linalg.norm(got[few] - expected) / np.linalg.norm(expected))


# With excess precision XLA leaves out a rounding to bfloat16 before one to float8.
@partial(jax.jit, static_argnums=0, compiler_options={**UNTUNED, "xla_allow_excess_precision": False})
def _expected(case: Case, few: jax.Array, inputs: Inputs, cache: Cache) -> jax.Array:
    if case.kind == "rope":
        return _to_check(case, *rotate_in_xla(case, inputs, cache))[few]
    (q, lengths), cache = jax.tree.map(lambda array: array[few], (inputs, cache))
    wide = [kv_cache.read(each, jnp.float32).astype(jnp.float32) for each in cache]
    return attend_in_xla(case, (q.astype(jnp.float32), lengths), wide)


@partial(jax.jit, static_argnums=0)
def _to_check(case: Case, out: jax.Array, cache: Cache) -> jax.Array:
    """`[B, heads, values]` float32; of rope with the heads of what stands at the cache's last position."""
    written = jax.tree.map(lambda array: array[:, -1], cache) if case.kind == "rope" else []
    arrays = out, *(kv_cache.read(each, jnp.float32) for each in written)
    return jnp.concatenate([array.astype(jnp.float32) for array in arrays], axis=1)


def table(result: dict[str, Any]) -> str:
    """One line an implementation of each case."""
    columns = f"{'us':>9}{'kernels':>9}{'MB':>9}{'GB/s':>7}{'copy':>6}{'error':>9}"
    lines = [f"{'case':32}{'implementation':20}{columns}"]
    for case in result["cases"]:
        tolerance = ROPE_TOLERANCE if case["kind"] == "rope" else roofline.TOLERANCE
        for name, row in case["results"].items():
            line = f"{case['case']:32}{name:20}"
            if "failed" in row:
                lines.append(line + row["failed"])
                continue
            line += f"{row['device_us']:9.1f}{number(row['num_kernels'], 9, 'd')}{row['bytes'] / 1e6:9.1f}"
            line += f"{row['gbs']:7.0f}{row['share']:6.0%}{row['error']:9.1e}"
            lines.append(line if row["error"] < tolerance else f"{line}  WRONG")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
