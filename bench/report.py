"""Which experts a run used: the table and the picture of what `epmoe-generate --expert-load FILE` recorded.

    python -m bench.report load.npz
    python -m bench.report load.npz --ep-size 8 --output load.png

`max / mean` of a layer: the rows of its busiest expert over the mean of all, summed over the run. `stepwise`: the same for each
window of time by itself, averaged over the windows' rows: experts that take turns at being busy are level over a run, not in a step.
With `--ep-size`, the same two of the ranks that the experts are dealt to: how much longer the busiest works than the mean.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from jax_epmoe.generate.expert_load import Recorded, read_expert_load


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="what --expert-load wrote")
    parser.add_argument(
        "--ep-size", type=int, metavar="N", help="parts that the experts are dealt into, for the ranks' columns"
    )
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="default: beside the file")
    args = parser.parse_args()
    try:
        recorded = read_expert_load(args.file)
        if not recorded.rows.size or not recorded.rows.any():
            raise ValueError(f"{args.file} holds no step; nothing was generated")
        experts = recorded.rows.shape[2]
        if args.ep_size is not None and (args.ep_size < 1 or experts % args.ep_size):
            raise ValueError(f"--ep-size is {args.ep_size}; it should be a divisor of the {experts} experts")
    except (ValueError, OSError) as error:
        print(f"bench.report: error: {error}", file=sys.stderr)
        return 2
    print(table(recorded, args.ep_size))
    path = args.output or args.file.with_suffix(".png")
    try:
        plot(recorded, path)
        print(f"wrote {path}")
    except ImportError:
        print("no plot: matplotlib is not installed")
    return 0


def imbalance(rows: np.ndarray) -> np.ndarray:
    """`[..., E]` -> `[...]`: the busiest over the mean; 1 where there is no row."""
    mean = rows.mean(axis=-1)
    return np.where(mean > 0, rows.max(axis=-1) / np.where(mean > 0, mean, 1), 1.0)


def stepwise_imbalance(rows: np.ndarray) -> np.ndarray:
    """`[W, L, E]` -> `[L]`: the sum over windows of the busiest, over that of the mean."""
    return rows.max(axis=-1).sum(axis=0) / rows.mean(axis=-1).sum(axis=0)


def of_ranks(rows: np.ndarray, ep_size: int) -> np.ndarray:
    """`[..., E]` -> `[..., ep_size]`: experts are dealt in blocks."""
    return rows.reshape(*rows.shape[:-1], ep_size, -1).sum(axis=-1)


def table(recorded: Recorded, ep_size: int | None = None) -> str:
    """A line a layer, and one for all."""
    rows = recorded.rows
    windows, layers, experts = rows.shape
    total = rows.sum(axis=0)  # [L, E]
    tokens = total.sum(axis=1).max() // recorded.top_k
    columns = {"max / mean": imbalance(total), "stepwise": stepwise_imbalance(rows)}
    if ep_size is not None:
        columns |= {
            f"ep {ep_size}": imbalance(of_ranks(total, ep_size)),
            "stepwise ": stepwise_imbalance(of_ranks(rows, ep_size)),
        }
    busiest, share = total.argmax(axis=1), total.max(axis=1) / total.sum(axis=1)
    unused = (total == 0).sum(axis=1)
    lines = [
        f"{recorded.model}: {tokens} tokens, top {recorded.top_k} of {experts} experts in {layers} layers, {windows} windows, "
        f"{recorded.seconds[-1]:.1f} s",
        f"{'layer':>6}" + "".join(f"{name:>12}" for name in columns) + f"{'busiest':>9}{'its share':>11}{'unused':>8}",
    ]
    for i, layer in enumerate(recorded.layers):
        figures = "".join(f"{column[i]:12.2f}" for column in columns.values())
        lines.append(f"{layer:6}{figures}{busiest[i]:9}{share[i]:11.1%}{unused[i]:8}")
    lines.append(f"{'mean':>6}" + "".join(f"{column.mean():12.2f}" for column in columns.values()))
    return "\n".join(lines)


def plot(recorded: Recorded, path: Path) -> None:
    """Draws layers x experts (1 is an even share), the imbalance of each layer beside it, and over time below.

    Raises:
      ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = recorded.rows
    windows, layers, experts = rows.shape
    total = rows.sum(axis=0)
    shares = total / np.maximum(total.mean(axis=1, keepdims=True), 1e-9)  # [L, E]
    height = max(4.0, min(8.0, 0.16 * layers + 1))
    figure, ((heat, bars), (over_time, empty)) = pyplot.subplots(
        2, 2, figsize=(12, 1.4 * height), width_ratios=(4, 1), height_ratios=(2, 1.2), layout="constrained"
    )
    empty.set_visible(False)
    # On a logarithmic scale experts that get nothing are as dark as a hundredth of an even share.
    low, high = max(shares.min(), 1e-2), shares.max()
    norm = (matplotlib.colors.LogNorm if high > 10 * low else matplotlib.colors.Normalize)(low, high)
    place = {"aspect": "auto", "interpolation": "nearest", "cmap": "magma"}
    image = heat.imshow(np.maximum(shares, low), norm=norm, **place)
    figure.colorbar(image, ax=heat, label="rows / an even share", location="left")
    heat.set(xlabel="expert", ylabel="layer")
    ticks = np.unique(np.linspace(0, layers - 1, min(layers, 16)).astype(int))
    for axes in (heat, over_time):
        axes.set_yticks(ticks, recorded.layers[ticks].tolist())
    bars.barh(np.arange(layers), imbalance(total), color="tab:blue", height=0.8, label="over the run")
    bars.plot(stepwise_imbalance(rows), np.arange(layers), "o", color="tab:orange", markersize=3, label="in a step")
    bars.axvline(1, color="black", linewidth=1)
    bars.set(ylim=(layers - 0.5, -0.5), yticks=[], xlabel="busiest expert / mean", xlim=(0, None))
    figure.legend(fontsize=8, loc="outside upper right")
    each = np.where(rows.any(axis=-1), imbalance(rows), np.nan).T  # [L, W]
    # Steps of few tokens, as at a run's end, would make all others look alike.
    filled = rows.sum(axis=(1, 2))
    most = np.nanmax(each[:, filled >= 0.5 * np.median(filled)])
    image = over_time.imshow(each, vmax=most, extent=(0, windows, layers - 0.5, -0.5), **place)
    steps = recorded.first_step[1] if windows > 1 else 1
    over_time.set(xlabel="step" if steps == 1 else f"window of {steps} steps", ylabel="layer")
    figure.colorbar(image, ax=over_time, label="busiest expert / mean", location="left")
    figure.suptitle(f"Rows of each expert: {recorded.model}, top {recorded.top_k} of {experts}", fontsize=11)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
