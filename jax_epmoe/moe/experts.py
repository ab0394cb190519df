"""A device's own experts on its rows: gate and up, down, and back to the tokens; in chunks, so that memory has a bound.

How many of the `T * k` pairs fall to a device is known only when the program runs: none, or all. Rows are therefore processed
`chunk_rows` at a time, as many chunks as there are rows. Only a chunk's activations are alive at once.

Where most pairs are the device's own, as on a single one, so many tokens are taken at a time that all their pairs are at most a
chunk: then no token's sum goes over several chunks.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_epmoe.config import Activation
from jax_epmoe.kernels.grouped_gemm import grouped_gemm
from jax_epmoe.kernels.grouped_gemm.quantized import refuse_gradient
from jax_epmoe.kernels.grouped_gemm.reference import outer
from jax_epmoe.kernels.quantize import gather_input, gathers, quantize_input
from jax_epmoe.kernels.rows import combine, dispatch
from jax_epmoe.moe.plan import ROW_ALIGNMENT, Plan, make_plan
from jax_epmoe.quant import QuantizedArray, QuantizedWeights

# What a chunk's activations may take by default. Rows that are not there cost memory and no time, a loop costs time: the host
# waits for the number of chunks.
_MAX_BYTES = 2**31


def default_chunk_rows(rows: int, hidden_size: int, intermediate_size: int, itemsize: int) -> int:
    """Rows of a chunk for `rows = T * k` pairs on a device that holds `intermediate_size` of an expert: all, or 2 GiB worth."""
    row_bytes = itemsize * (2 * hidden_size + intermediate_size)
    return -(-min(rows, _MAX_BYTES // row_bytes) // ROW_ALIGNMENT) * ROW_ALIGNMENT


class _Chunk(NamedTuple):
    """`Plan`, for `chunk_rows` consecutive rows of it."""

    row_pair: jax.Array  # [chunk_rows] int32
    row_token: jax.Array  # [chunk_rows] int32
    group_sizes: jax.Array  # [E_local] int32
    pair_row: jax.Array  # [T, k] int32; chunk_rows where the pair has no row in this chunk
    first_token: jax.Array | int = 0  # of a chunk of some tokens alone, which is what T are then

    def of_tokens(self, values: jax.Array) -> jax.Array:
        """Of something for each token, what this chunk's tokens have."""
        return jax.lax.dynamic_slice_in_dim(values, self.first_token, len(self.pair_row))


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9))
def run_experts(
    tokens: jax.Array,
    w_gate_up: jax.Array | QuantizedWeights,
    w_down: jax.Array | QuantizedWeights,
    weights: jax.Array,
    plan: Plan,
    base: jax.Array | None,
    activation: Activation,
    backend: str | None,
    chunk_rows: int,
    expected_rows: int | None = None,
    biases: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """`base` and each token's weighted sum over its experts on this device, if it has any. Differentiable by recomputation.

    Quantised weights have no gradient. Tokens are quantised before they are copied to rows, or each row as it is copied, where that
    costs less; the second product's input as it leaves the first, from float32. A dynamic scale of it per tensor or per token is over a chunk's rows and this device's part of I.

    Args:
      tokens: `[T, H]`.
      w_gate_up: `[E, 2, I, H]`, gate first.
      w_down: `[E, H, I]`, quantised if `w_gate_up` is.
      weights: `[T, k]` float32.
      plan: of the device's rows.
      base: `[T, H]`; None: zeros.
      activation: as `grouped_gemm`'s.
      backend: of `grouped_gemm`.
      chunk_rows: how many rows are processed at a time, a multiple of 8.
      expected_rows: about how many of the pairs will be this device's; None: all.
      biases: `[E, 2, I]`, added to what `w_gate_up` gives, and `[E, H]`, to what `w_down` gives; or None.

    Returns:
      `[T, H]` in the tokens' dtype, summed in float32.
    """
    mostly_here = _mostly_here(plan, expected_rows)
    parts = _parts_of_tokens(plan, chunk_rows) if mostly_here else 1
    own_expected_rows = None if expected_rows is None else -(-expected_rows // parts)
    multiply = functools.partial(grouped_gemm, backend=backend, expected_rows=own_expected_rows)
    gate_up, down = _products(
        tokens,
        w_gate_up,
        w_down,
        biases or (None, None),
        activation,
        multiply,
        backend,
        rows=plan.row_pair.shape[0] if expected_rows is None else expected_rows,
        deal=mostly_here,
    )

    def run_chunk(chunk: _Chunk, base: jax.Array | None, dtype: jax.typing.DTypeLike) -> jax.Array:
        with jax.named_scope("gate_up"):
            hidden = gate_up(chunk)  # [chunk_rows, I]
        with jax.named_scope("down"):
            y = down(chunk, hidden)  # [chunk_rows, H]
        with jax.named_scope("combine"):
            return combine(y, chunk.pair_row, chunk.of_tokens(weights), base, dtype)

    if _is_one_chunk(plan, chunk_rows):
        return run_chunk(_whole(plan), base, tokens.dtype)

    if parts > 1:
        size = -(-len(tokens) // parts)  # the last part begins early enough to be as large

        def run_part(index: jax.Array, out: jax.Array) -> jax.Array:
            chunk = _of_tokens(plan, index * size, size)
            part = run_chunk(chunk, None if base is None else chunk.of_tokens(base), tokens.dtype)
            return jax.lax.dynamic_update_slice_in_dim(out, part, index * size, axis=0)

        return jax.lax.fori_loop(0, parts, run_part, jax.lax.empty(tokens.shape, tokens.dtype))

    chunks = _chunks(plan, chunk_rows)

    def run_chunks() -> jax.Array:
        start = jnp.zeros(tokens.shape, jnp.float32) if base is None else base.astype(jnp.float32)
        out = _over_chunks(chunks, lambda chunk, out: run_chunk(chunk, out, out.dtype), start)
        return out.astype(tokens.dtype)

    # As a rule a device's rows are one chunk, and then nothing but the result is written for every token.
    return jax.lax.cond(chunks.number > 1, run_chunks, lambda: run_chunk(chunks.at(0), base, tokens.dtype))


def _products(
    tokens: jax.Array,
    w_gate_up: jax.Array | QuantizedWeights,
    w_down: jax.Array | QuantizedWeights,
    biases: tuple[jax.Array, jax.Array] | tuple[None, None],
    activation: Activation,
    multiply: Callable[..., Any],
    backend: str | None,
    *,
    rows: int,
    deal: bool,
) -> tuple[Callable[[_Chunk], Any], Callable[[_Chunk, Any], jax.Array]]:
    """`chunk -> hidden`, which is quantised if the weights are, and `(chunk, hidden) -> y`.

    `rows`: about how many there will be, in all chunks.
    `deal`: tokens are dealt to their rows, if a kernel does that, rather than gathered by them.
    """
    gate_up_bias, down_bias = biases
    if not (isinstance(w_gate_up, QuantizedWeights) and isinstance(w_down, QuantizedWeights)):

        def plain_gate_up(chunk: _Chunk) -> jax.Array:
            options = {"w": w_gate_up, "bias": gate_up_bias, "group_sizes": chunk.group_sizes, "activation": activation}
            product = functools.partial(multiply, **options)
            rows = dispatch(chunk.of_tokens(tokens), chunk.pair_row, len(chunk.row_token)) if deal else None
            return product(tokens, row_index=chunk.row_token) if rows is None else product(rows)

        return plain_gate_up, lambda chunk, hidden: multiply(hidden, w_down, chunk.group_sizes, bias=down_bias)

    static, once = w_gate_up.input_scales, None
    if not gathers(tokens, rows, w_gate_up, backend):
        with jax.named_scope("quantize"):
            once = quantize_input(tokens, w_gate_up, backend)

    def rows_of(chunk: _Chunk) -> tuple[QuantizedArray, jax.Array | None]:
        """The chunk's rows, or what they are rows of and which."""
        if once is None:
            return gather_input(tokens, chunk.row_token, jnp.sum(chunk.group_sizes), w_gate_up), None
        return once, chunk.row_token

    def gate_up(chunk: _Chunk) -> QuantizedArray:
        x, index = rows_of(chunk)
        scales = _scales(x, w_gate_up, None if static is None else jnp.max(static))
        options = {"row_index": index, "activation": activation, "quantize_out": w_down.format.activations}
        options["out_scale"] = w_down.input_scales
        return multiply(x.values, w_gate_up.weights.values, chunk.group_sizes, bias=gate_up_bias, **scales, **options)

    def down(chunk: _Chunk, hidden: QuantizedArray) -> jax.Array:
        options = {"bias": down_bias, "out_dtype": tokens.dtype, **_scales(hidden, w_down, w_down.input_scales)}
        return multiply(hidden.values, w_down.weights.values, chunk.group_sizes, **options)

    return gate_up, down


def _scales(x: QuantizedArray, w: QuantizedWeights, static: jax.Array | None) -> dict[str, jax.Array]:
    """Those of a product; `static` ones of x, one or an expert's each, go into the weights': then no row needs its own."""
    if static is None:
        return {"x_scale": x.scales, "w_scale": w.weights.scales}
    return {"x_scale": jnp.ones((), jnp.float32), "w_scale": w.weights.scales * static}


def _forward(tokens, w_gate_up, w_down, weights, plan, base, activation, backend, chunk_rows, expected_rows, biases):
    if isinstance(w_gate_up, QuantizedWeights):
        refuse_gradient()
    out = run_experts(
        tokens, w_gate_up, w_down, weights, plan, base, activation, backend, chunk_rows, expected_rows, biases
    )
    like_base = None if base is None else jnp.zeros((), base.dtype)
    return out, (tokens, w_gate_up, w_down, weights, plan, like_base, biases)


def _backward(activation, backend, chunk_rows, expected_rows, saved, d_out):
    tokens, w_gate_up, w_down, weights, plan, like_base, biases = saved
    multiply = functools.partial(grouped_gemm, backend=backend, expected_rows=expected_rows)

    def add_chunk(chunk: _Chunk, sums):
        d_tokens, d_w_gate_up, d_w_down, d_weights, d_biases = sums
        row_weight = weights.reshape(-1)[chunk.row_pair][:, None]
        rows, d_out_rows = tokens[chunk.row_token], d_out[chunk.row_token]
        hidden, pull_gate_up = jax.vjp(
            lambda x, w, bias: multiply(x, w, chunk.group_sizes, bias=bias, activation=activation),
            rows,
            w_gate_up,
            None if biases is None else biases[0],
        )
        # A row's weight may as well scale what goes into the second product: its gradient then needs no y.
        scaled = (row_weight * hidden).astype(tokens.dtype)
        _, pull_down = jax.vjp(lambda x, w: multiply(x, w, chunk.group_sizes), scaled, w_down)
        d_scaled, d_w_down_part = pull_down(d_out_rows.astype(tokens.dtype))
        d_row_weight = jnp.sum(d_scaled.astype(jnp.float32) * hidden, axis=1)
        d_rows, d_w_gate_up_part, d_gate_up_bias = pull_gate_up((row_weight * d_scaled).astype(tokens.dtype))
        if biases is not None:  # of what a token gets, each row's weight times its expert's vector
            of_rows = jnp.repeat(biases[1], chunk.group_sizes, axis=0, total_repeat_length=len(rows))
            d_row_weight += jnp.sum(d_out_rows.astype(jnp.float32) * of_rows, axis=1)
            d_down_bias = outer(d_out_rows, row_weight.astype(d_out.dtype), chunk.group_sizes, out_dtype=jnp.float32)
            d_biases = d_biases[0] + d_gate_up_bias, d_biases[1] + d_down_bias[..., 0]
        return (
            combine(d_rows, chunk.pair_row, jnp.ones_like(weights), d_tokens),
            d_w_gate_up + d_w_gate_up_part,
            d_w_down + d_w_down_part,
            d_weights + d_row_weight.at[chunk.pair_row].get(mode="fill", fill_value=0),
            d_biases,
        )

    inputs = (tokens, w_gate_up, w_down, weights, biases)
    sums = jax.tree.map(lambda value: jnp.zeros(value.shape, jnp.float32), inputs)
    if _is_one_chunk(plan, chunk_rows):
        sums = add_chunk(_whole(plan), sums)
    else:
        sums = _over_chunks(_chunks(plan, chunk_rows), add_chunk, sums)
    *gradients, d_biases = jax.tree.map(lambda total, value: total.astype(value.dtype), sums, inputs)
    d_base = None if like_base is None else d_out.astype(like_base.dtype)
    return *gradients, None, d_base, d_biases


run_experts.defvjp(_forward, _backward)


def _is_one_chunk(plan: Plan, chunk_rows: int) -> bool:
    """Whether one chunk holds any load; there is then no loop."""
    return plan.row_pair.shape[0] <= chunk_rows


def _mostly_here(plan: Plan, expected_rows: int | None) -> bool:
    """Whether most pairs are this device's, so that going over all of them costs less than reading a token once a row."""
    return expected_rows is None or 2 * expected_rows > plan.row_pair.shape[0]


def _whole(plan: Plan) -> _Chunk:
    return _Chunk(plan.row_pair, plan.row_pair // plan.pair_row.shape[1], plan.group_sizes, plan.pair_row)


def _parts_of_tokens(plan: Plan, chunk_rows: int) -> int:
    """Into how many parts tokens are cut so that all pairs of each fit a chunk; 1 if a chunk does not hold those of one token."""
    tokens, top_k = plan.pair_row.shape
    return max(1, -(-tokens // (chunk_rows // top_k))) if top_k <= chunk_rows else 1


def _of_tokens(plan: Plan, first_token: jax.Array, count: int) -> _Chunk:
    """All rows of `count` tokens."""
    with jax.named_scope("plan"):
        experts = jax.lax.dynamic_slice_in_dim(plan.pair_expert, first_token, count)
        chunk = _whole(make_plan(experts, 0, len(plan.group_sizes)))
        first_row = jnp.minimum(first_token, len(plan.pair_expert) - count)  # as slices begin
        return chunk._replace(row_token=chunk.row_token + first_row, first_token=first_token)


class _Chunks(NamedTuple):
    at: Callable[[jax.Array | int], _Chunk]
    number: jax.Array  # of those that hold rows, int32


def _chunks(plan: Plan, chunk_rows: int) -> _Chunks:
    top_k = plan.pair_row.shape[1]
    row_pair = jnp.pad(plan.row_pair, (0, -plan.row_pair.shape[0] % chunk_rows))
    ends = jnp.cumsum(plan.group_sizes)
    starts = ends - plan.group_sizes

    def chunk_at(index: jax.Array | int) -> _Chunk:
        first = index * chunk_rows
        own_pairs = jax.lax.dynamic_slice_in_dim(row_pair, first, chunk_rows)
        sizes = jnp.clip(ends, first, first + chunk_rows) - jnp.clip(starts, first, first + chunk_rows)
        inside = (plan.pair_row >= first) & (plan.pair_row < first + chunk_rows)
        pair_row = jnp.where(inside, plan.pair_row - first, chunk_rows)
        return _Chunk(own_pairs, own_pairs // top_k, sizes, pair_row)

    return _Chunks(chunk_at, (ends[-1] + chunk_rows - 1) // chunk_rows)


def _over_chunks[Carry](chunks: _Chunks, step: Callable[[_Chunk, Carry], Carry], carry: Carry) -> Carry:
    """`carry = step(chunk, carry)` for all chunks that hold rows."""
    return jax.lax.fori_loop(0, chunks.number, lambda index, carry: step(chunks.at(index), carry), carry)
