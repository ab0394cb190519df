"""Which tiling the Hopper kernel runs with, by a call's static sizes."""

from dataclasses import dataclass

_NUM_SMS = 132


@dataclass(frozen=True)
class Tiling:
    """How the kernel cuts its work.

    Attributes:
      columns: output columns of a tile (with a gate: as many gate and up columns each), a multiple of 128.
      heights: the row heights that code is made for, rising multiples of 8; the last is the largest.
      block_k: how much of k a stage holds.
      stages: how many stages the ring has.
      largest_heights: candidates for a tile's largest height; () for `heights[-1]` alone.
      lag: release a stage one step late, so that one wgmma is always in flight.
      slots: 64-column blocks of output that wait in shared memory, a warpgroup.
    """

    columns: int = 256
    heights: tuple[int, ...] = (128,)
    block_k: int = 64
    stages: int = 4
    largest_heights: tuple[int, ...] = ()
    lag: bool = False
    slots: int = 1


def choose_tiling(*, rows: int, experts: int, n: int, k: int, gated: bool) -> Tiling:
    """A tiling for `rows` rows over `experts` groups of unknown sizes, `k` -> `n` (with a gate: n of each half).

    Found on one H100 with loads drawn from a Dirichlet(2) distribution.
    """
    rows_per_expert = rows / experts
    # Decoding reads weights and little else: low tiles, deep stages. A crowded expert gets the higher tile.
    if rows_per_expert <= 16:
        return Tiling(columns=128, heights=(16, 32), block_k=128, stages=3 if gated else 5)
    if rows_per_expert <= 48:
        return Tiling(columns=128, heights=(16, 32, 64), stages=5 if gated else 8)
    narrow = gated or -(-n // 256) * 256 > 1.15 * n
    columns = 128 if narrow else 256
    if k <= 512:  # hardly any main loop: what counts is how few rows are padded
        return Tiling(columns=columns, heights=tuple(range(16, 129, 16)), stages=3)
    stages = 4 if gated or not narrow else 5
    rounds = rows / 128 * -(-n // columns) / _NUM_SMS  # of tiles, if all were full
    if rounds <= 8:  # much of the time goes into the last round: heights that fit the groups, the best of them picked
        heights, candidates = (32, 64, 80, 96, 112, 128), (128, 112, 96, 80, 64)
        return Tiling(columns=columns, heights=heights, largest_heights=candidates, stages=stages)
    if rows_per_expert <= 768:
        return Tiling(columns=columns, heights=(64, 88, 112, 128), stages=stages, lag=k >= 1024)
    return Tiling(columns=columns, stages=stages, lag=k >= 4096)  # each further height costs the main loop a little
