"""The order of a Hopper kernel's tiles."""

import jax.numpy as jnp

from jax_epmoe.kernels.grouped_gemm import tiles


def test_a_bands_row_tiles_go_through_all_columns_before_the_next_ones_do():
    rows, columns = tiles.place(jnp.arange(15), jnp.int32(5), column_tiles=3, band=2)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2),
        (2, 0), (3, 0), (2, 1), (3, 1), (2, 2), (3, 2),
        (4, 0), (4, 1), (4, 2),
    ]  # fmt: skip
