"""How many rows each expert of each MoE layer got while a model ran: recorded over time, kept in one small file.

    recorder = ExpertLoad.of(model.config)
    Engine(model, expert_load=recorder).generate(prompts)
    recorder.save("load.npz")

`python -m bench.report load.npz` draws it.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from jax_epmoe.config import ModelConfig, require

FORMAT_VERSION = 1

# However long a run, its file holds no more windows than this: at 48 layers of 128 experts, 12 MiB before compression.
MOST_WINDOWS = 512


@dataclass(frozen=True)
class Recorded:
    """What a file holds.

    Attributes:
      model: the model's name.
      layers: `[L]` int32: where each MoE layer stands in the model.
      rows: `[W, L, E]` int64: the rows that each expert got in each window of steps, one row a token and chosen expert.
      first_step: `[W]` int64: the first step of each window.
      seconds: `[W]` float64: when the window's last step was read, since the first was.
      top_k: experts a token.
    """

    model: str
    layers: np.ndarray
    rows: np.ndarray
    first_step: np.ndarray
    seconds: np.ndarray
    top_k: int


class ExpertLoad:
    """Sums steps into windows of equal length: one step each at first, twice as long whenever there are `most_windows`."""

    def __init__(
        self, model: str, layers: Sequence[int], num_experts: int, top_k: int, most_windows: int = MOST_WINDOWS
    ):
        require(most_windows >= 2 and most_windows % 2 == 0, "most_windows", most_windows, "an even number from 2")
        self.model = model
        self.layers = tuple(layers)
        self.shape = (len(self.layers), num_experts)
        self.top_k = top_k
        self.steps = 0
        self._most_windows = most_windows
        self._steps_a_window = 1
        self._rows: list[np.ndarray] = []
        self._seconds: list[float] = []
        self._start: float | None = None

    @classmethod
    def of(cls, config: ModelConfig, name: str = "model") -> Self:
        """A recorder for a model of this `config`."""
        layers = [i for i, has_experts in enumerate(config.moe_layers) if has_experts]
        return cls(name, layers, config.moe.num_experts, config.moe.top_k)

    def add(self, rows: np.ndarray) -> None:
        """One step's rows, `[L, E]`, as `Decoder.hidden_with_load` counts them.

        Raises:
          ValueError: another shape.
        """
        rows = np.asarray(rows)
        require(rows.shape == self.shape, "rows.shape", rows.shape, f"{self.shape}: [MoE layers, experts]")
        now = time.perf_counter()
        self._start = now if self._start is None else self._start
        if self.steps % self._steps_a_window == 0:
            if len(self._rows) == self._most_windows:
                self._rows = [a + b for a, b in zip(self._rows[::2], self._rows[1::2], strict=True)]
                self._seconds = self._seconds[1::2]
                self._steps_a_window *= 2
            self._rows.append(np.zeros(self.shape, np.int64))
            self._seconds.append(0.0)
        self._rows[-1] += rows
        self._seconds[-1] = now - self._start
        self.steps += 1

    def recorded(self) -> Recorded:
        return Recorded(
            model=self.model,
            layers=np.array(self.layers, np.int32),
            rows=np.array(self._rows, np.int64).reshape(-1, *self.shape),
            first_step=np.arange(len(self._rows), dtype=np.int64) * self._steps_a_window,
            seconds=np.array(self._seconds, np.float64),
            top_k=self.top_k,
        )

    def save(self, path: str | Path) -> None:
        """Writes a compressed NumPy archive (`.npz`) of `Recorded`'s fields.

        Raises:
          OSError: it cannot be written.
        """
        with open(path, "wb") as file:  # by itself NumPy would add a suffix
            np.savez_compressed(file, format_version=FORMAT_VERSION, **vars(self.recorded()))


def read_expert_load(path: str | Path) -> Recorded:
    """What `ExpertLoad.save` wrote.

    Raises:
      ValueError: another kind of file, or a damaged one.
      OSError: it cannot be read.
    """
    wanted = "a file that --expert-load wrote"
    try:
        with np.load(path, allow_pickle=False) as file:
            fields = {name: file[name] for name in file.files}
    except OSError:
        raise
    except Exception:  # whatever NumPy and zipfile make of other bytes
        raise ValueError(f"{path} is no readable .npz; it should be {wanted}") from None
    names = {"format_version", *Recorded.__dataclass_fields__}
    require(names == fields.keys(), f"{path}: fields", sorted(fields), f"{sorted(names)}, of {wanted}")
    version = int(fields.pop("format_version"))
    require(version == FORMAT_VERSION, f"{path}: format_version", version, str(FORMAT_VERSION))
    fields |= {"model": str(fields["model"]), "top_k": int(fields["top_k"])}
    recorded = Recorded(**fields)
    windows, layers = len(recorded.first_step), len(recorded.layers)
    require(recorded.rows.ndim == 3 and recorded.rows.shape[:2] == (windows, layers), f"{path}: rows.shape",
            recorded.rows.shape, f"({windows}, {layers}, experts)")  # fmt: skip
    return recorded
