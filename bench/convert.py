"""The converter's rate beside Orbax's own `StandardCheckpointer.save` of the same arrays from memory, on one disk.

    python -m bench.convert --folder FOLDER [--gb 4]

It writes a Mixtral of random weights to FOLDER, and in turns: converts it, saves its arrays by Orbax (as Orbax does by default, and
uncompressed), verifies the conversion, and converts it back. The checkpoint's files are dropped from the page cache before each; writes are
flushed to the disk on every side.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import v1
from safetensors.numpy import save_file

import weights_convert

HIDDEN, INTERMEDIATE, EXPERTS, VOCAB = 1024, 3584, 8, 32000
CONFIG = {
    "model_type": "mixtral", "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


def make(folder: Path, layers: int) -> None:
    """A checkpoint of random weights, a file a layer."""
    rng, weight_map = np.random.default_rng(0), {}

    def save(file: str, shapes: dict[str, tuple[int, ...]]) -> None:
        normal = {
            name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in shapes.items()
        }
        save_file(normal, folder / file)
        weight_map.update(dict.fromkeys(shapes, file))

    table = (VOCAB, HIDDEN)
    save(
        "rest.safetensors",
        {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": (HIDDEN,)},
    )
    for i in range(layers):
        at, moe = f"model.layers.{i}", f"model.layers.{i}.block_sparse_moe"
        shapes = {f"{at}.self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"}
        shapes |= {f"{at}.{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
        shapes[f"{moe}.gate.weight"] = (EXPERTS, HIDDEN)
        for e in range(EXPERTS):
            up, down = (INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
            shapes |= {f"{moe}.experts.{e}.{name}.weight": down if name == "w2" else up for name in ("w1", "w2", "w3")}
        save(f"layer-{i}.safetensors", shapes)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def drop_from_cache(folder: Path) -> None:
    """So that the next reading is from the disk."""
    for file in (file for file in folder.rglob("*") if file.is_file()):
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def save_standard(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """As Orbax does by default: with zstd."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, arrays)
        checkpointer.wait_until_finished()


def save_uncompressed(folder: Path, arrays: dict[str, np.ndarray]) -> None:
    """Orbax's newer API without compression."""
    context = v1.Context()
    context.array.saving.use_compression = False
    with context:
        v1.save(folder, arrays)


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="bench.convert", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", default=".", help="on the disk to measure; what is written there is removed")
    parser.add_argument("--gb", type=float, default=4.0, help="of the checkpoint (default: 4)")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default: 3)")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name).absolute()
        src, ours, back = root / "src", root / "ours", root / "back"
        src.mkdir()
        make(src, max(1, round(args.gb * 1e9 / (2 * (3 * EXPERTS * HIDDEN * INTERMEDIATE + 4 * HIDDEN**2)))))
        nbytes = weights_convert.convert(src, ours, progress=False).nbytes
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(ours / "params" / "state")
        steps: dict[str, Callable[[], object]] = {
            "convert": lambda: weights_convert.convert(src, ours, progress=False),
            "StandardCheckpointer.save, from memory": lambda: save_standard(root / "standard", arrays),
            "v1.save uncompressed, from memory": lambda: save_uncompressed(root / "uncompressed", arrays),
            "verify": lambda: weights_convert.verify(src, ours, progress=False),
            "to_hf": lambda: weights_convert.to_hf(ours, back, progress=False),
        }
        print(f"{nbytes / 1e9:.2f} GB, {os.cpu_count()} CPU cores; MB/s")
        rates: dict[str, list[float]] = {step: [] for step in steps}
        shutil.rmtree(ours)
        for _ in range(args.repeat):
            for step, run in steps.items():
                drop_from_cache(src)
                os.sync()
                start = time.perf_counter()
                run()
                rates[step].append(nbytes / (time.perf_counter() - start) / 1e6)
            for folder in (ours, back, root / "standard", root / "uncompressed"):
                shutil.rmtree(folder)
        for step, seen in rates.items():
            print(f"{step:40} {' '.join(f'{rate:6.0f}' for rate in seen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
