"""The Triton kernels behind triton.py, in a file of their own because Triton, which is optional, must be there to define them.

Sizes and strides are compile-time constants: as plain integers they carry no divisibility, and loads would not be vectorised.
"""

import triton
import triton.language as tl


@triton.jit
def matmul(
    x,
    w,
    group_sizes,
    row_index,
    bias,
    x_scale,
    w_scale,
    out,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    STRIDE_N: tl.constexpr,
    STRIDE_K: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    X_SCALE_ROW: tl.constexpr,
    X_SCALE_K: tl.constexpr,
    W_SCALE_MATRIX: tl.constexpr,
    W_SCALE_COLUMN: tl.constexpr,
    W_SCALE_K: tl.constexpr,
):
    """One tile of the output a program: BLOCK_M rows of one expert, BLOCK_N of w's columns; programs past the last tile exit.

    With a gate, even columns of the tile are gate's and odd ones up's, so that a thread holds both halves of what it multiplies.

    Operands have scales if W_SCALE_MATRIX, how far the scales of two matrices lie apart, is not 0. The other strides are of a row of
    x, of a column of w (of 128, if W_SCALE_K) and of BLOCK_K along k; 0 where one scale serves all.
    """
    PARTS: tl.constexpr = 1 if ACTIVATION == "" else 2
    COLUMNS: tl.constexpr = BLOCK_N // PARTS  # of the output
    COLUMN_TILES: tl.constexpr = (N + COLUMNS - 1) // COLUMNS

    experts = tl.arange(0, triton.next_power_of_2(EXPERTS))
    sizes = tl.load(group_sizes + experts, mask=experts < EXPERTS, other=0)
    tiles = (sizes + (BLOCK_M - 1)) // BLOCK_M * COLUMN_TILES
    tile_ends = tl.cumsum(tiles)
    tile = tl.program_id(0)
    expert = tl.sum((tile_ends <= tile).to(tl.int32))
    if expert >= EXPERTS:
        return
    start = tl.sum(tl.where(experts < expert, sizes, 0))
    size = tl.sum(tl.where(experts == expert, sizes, 0))
    tile -= tl.sum(tl.where(experts < expert, tiles, 0))

    # Down a band of rows before the next column, so that the programs that run at a time share rows and weights in the L2.
    band = tile // (BAND * COLUMN_TILES)
    in_band = tl.minimum((size + (BLOCK_M - 1)) // BLOCK_M - band * BAND, BAND)
    tile -= band * (BAND * COLUMN_TILES)
    first_row = start + (band * BAND + tile % in_band) * BLOCK_M
    first_column = tile // in_band * COLUMNS

    rows = first_row + tl.arange(0, BLOCK_M)
    row_inside = rows < start + size
    sources = tl.load(row_index + rows, mask=row_inside, other=0) if HAS_INDEX else rows
    lanes = tl.arange(0, BLOCK_N)
    w_columns = first_column + lanes // PARTS
    w_inside = w_columns < N
    w_rows = w_columns + lanes % PARTS * N

    ks = tl.arange(0, BLOCK_K)
    x_tile = x + sources.to(tl.int64)[:, None] * K + ks[None, :]
    w_tile = (
        w + expert.to(tl.int64) * (PARTS * N * K) + w_rows.to(tl.int64)[None, :] * STRIDE_N + ks[:, None] * STRIDE_K
    )
    x_scales = x_scale + sources.to(tl.int64) * X_SCALE_ROW
    w_scales = w_scale + (expert * PARTS + lanes % PARTS) * W_SCALE_MATRIX
    w_scales += w_columns // (BLOCK_K if W_SCALE_K else 1) * W_SCALE_COLUMN
    product = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x_mask = row_inside[:, None]
        w_mask = w_inside[None, :]
        if K % BLOCK_K != 0:
            x_mask = x_mask & (ks < K - k)[None, :]
            w_mask = w_mask & (ks < K - k)[:, None]
        x_values = tl.load(x_tile, mask=x_mask, other=0.0)
        w_values = tl.load(w_tile, mask=w_mask, other=0.0)
        if W_SCALE_MATRIX == 0:
            product = tl.dot(x_values, w_values, product, input_precision="ieee")
        else:
            # Tensor cores add float8 products with few bits: each step's sum is their own, and goes to float32 from there.
            part = tl.dot(x_values, w_values) * tl.load(x_scales, mask=row_inside, other=0.0)[:, None]
            product += part * tl.load(w_scales, mask=w_inside, other=0.0)[None, :]
            x_scales += X_SCALE_K
            w_scales += W_SCALE_K
        x_tile += BLOCK_K
        w_tile += BLOCK_K * STRIDE_K

    if HAS_BIAS:
        product += tl.load(bias + expert * (PARTS * N) + w_rows, mask=w_inside, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION != "":
        gate, up = tl.split(tl.reshape(product, (BLOCK_M, COLUMNS, 2)))
        if ACTIVATION == "clamped_swiglu":
            gate = tl.minimum(gate, LIMIT)
            product = gate * tl.sigmoid(ALPHA * gate) * (tl.maximum(tl.minimum(up, LIMIT), -LIMIT) + 1)
        else:
            product = _activate(gate, ACTIVATION) * up
    columns = first_column + tl.arange(0, COLUMNS)
    tl.store(
        out + rows.to(tl.int64)[:, None] * N + columns[None, :],
        product.to(out.dtype.element_ty),
        mask=row_inside[:, None] & (columns < N)[None, :],
    )


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return value * tl.sigmoid(value)
    elif ACTIVATION == "gelu":
        return 0.5 * value * (1 + tl.erf(value * 0.7071067811865476))
    else:  # gelu_pytorch_tanh: 0.5 * (1 + tanh(u)) is sigmoid(2u)
        return value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))


@triton.jit
def outer(
    left,
    right,
    group_sizes,
    out,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """One tile of an expert's `[N, K]` a program, summed over the expert's rows."""
    experts = tl.arange(0, triton.next_power_of_2(EXPERTS))
    sizes = tl.load(group_sizes + experts, mask=experts < EXPERTS, other=0)
    expert = tl.program_id(1)
    start = tl.sum(tl.where(experts < expert, sizes, 0))
    size = tl.sum(tl.where(experts == expert, sizes, 0))
    tile = tl.program_id(0)
    N_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    ns = tile % N_TILES * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tile // N_TILES * BLOCK_K + tl.arange(0, BLOCK_K)
    n_inside, k_inside = ns < N, ks < K

    rows = tl.arange(0, BLOCK_ROWS)
    left_tile = left + (start + rows).to(tl.int64)[None, :] * N + ns[:, None]
    right_tile = right + (start + rows).to(tl.int64)[:, None] * K + ks[None, :]
    total = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for row in range(0, size, BLOCK_ROWS):
        inside = rows < size - row
        left_values = tl.load(left_tile, mask=inside[None, :] & n_inside[:, None], other=0.0)
        right_values = tl.load(right_tile, mask=inside[:, None] & k_inside[None, :], other=0.0)
        total = tl.dot(left_values, right_values, total, input_precision="ieee")
        left_tile += BLOCK_ROWS * N
        right_tile += BLOCK_ROWS * K
    tl.store(
        out + expert.to(tl.int64) * (N * K) + ns.to(tl.int64)[:, None] * K + ks[None, :],
        total.to(out.dtype.element_ty),
        mask=n_inside[:, None] & k_inside[None, :],
    )
