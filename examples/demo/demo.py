"""The whole path on the embedded checkpoint: convert it, load it over eight devices, measure it on text that it never saw,
show where its experts are and what they get, and let it write. `make demo` runs this.

Eight GPUs are used where there are eight; otherwise eight CPU devices, which all share this machine's cores.
"""

import glob
import os
import shutil
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from text import load_text, windows
from tqdm import tqdm
from transformers import AutoTokenizer

import jax_epmoe as ep
from jax_epmoe.generate.engine import Engine
from jax_epmoe.generate.sampling import SamplingParams
from jax_epmoe.mesh import split_cpu
from jax_epmoe.models.decoder import Decoder
from weights_convert import convert

DEVICES = 8
HERE = Path(__file__).resolve().parent
CONVERTED = HERE.parents[1] / ".demo" / "checkpoint"
BATCH = 8
PROMPTS = ["HAMLET.\n", "ROMEO.\nBut soft, what light", "Enter three WITCHES.\n"]


def main() -> None:
    platform = choose_devices()
    print("1. Convert the Hugging Face checkpoint", flush=True)
    shutil.rmtree(CONVERTED, ignore_errors=True)
    convert(HERE / "checkpoint", CONVERTED)

    print(f"\n2. Load it over {DEVICES} {platform} devices: tp_size {DEVICES}, ep_size {DEVICES}", flush=True)
    mesh = ep.make_mesh(tp_size=DEVICES, ep_size=DEVICES)
    # On a CPU, bfloat16 is emulated and slow.
    model = ep.load_model(CONVERTED, mesh=mesh, dtype=jnp.float32 if platform == "CPU" else None, progress=True)
    tokenizer = AutoTokenizer.from_pretrained(CONVERTED)

    print("\n3. Measure it on the 5% of the text that it never saw", flush=True)
    measure(model, tokenizer)

    print("\n4. Let it write", flush=True)
    write(model, tokenizer)
    print(
        f"\nMore of it:  .venv/bin/epmoe-generate --model {CONVERTED.relative_to(Path.cwd(), walk_up=True)} --prompt 'ROMEO.'"
    )


def choose_devices() -> str:
    """Must run before JAX looks at its devices. Returns what they are called."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = glob.glob("/dev/nvidia[0-9]*") if visible is None else [name for name in visible.split(",") if name]
    if len(gpus) >= DEVICES:
        return "GPU"
    jax.config.update("jax_platforms", "cpu")
    split_cpu(DEVICES)
    return "CPU"


def measure(model: Decoder, tokenizer) -> None:
    """Bits per byte of the held-out text, beside a unigram model's, and how many rows each expert got."""
    train, held_out = load_text()
    token_ids = tokenizer(held_out, add_special_tokens=False)["input_ids"]
    num_bytes = len(held_out.encode())
    start = time.perf_counter()
    bits, load = bits_and_load(model, token_ids, tokenizer.bos_token_id)
    seconds = time.perf_counter() - start
    unigram = unigram_bits(tokenizer(train, add_special_tokens=False)["input_ids"], token_ids, model.config.vocab_size)
    print(f"held-out text: {num_bytes} bytes, {len(token_ids)} tokens, in {seconds:.0f} s")
    print(f"  this model:    {bits / num_bytes:.3f} bits per byte")
    print(f"  unigram model: {unigram / num_bytes:.3f} bits per byte")
    show_experts(model, load)


def bits_and_load(model: Decoder, token_ids: list[int], bos: int) -> tuple[float, np.ndarray]:
    """`-log2 p` summed over all tokens, each predicted within its window (`text.windows`), and rows `[MoE layers, E]`."""
    pairs = windows(token_ids, bos)
    inputs = pad([inputs for inputs, _ in pairs], fill=bos)
    targets = pad([targets for _, targets in pairs], fill=-1)
    graphdef, state = nnx.split(model)

    @jax.jit
    def evaluate(state, inputs, targets):
        real = targets >= 0
        logits, load = nnx.merge(graphdef, state).with_load(inputs, jnp.sum(real, axis=1))
        log_p = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(log_p, jnp.maximum(targets, 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(jnp.where(real, chosen, 0)) / jnp.log(2.0), load

    bits, load = 0.0, 0
    for i in tqdm(range(0, len(inputs), BATCH), desc="measuring", unit="batch", file=sys.stderr):
        batch_bits, batch_load = evaluate(state, inputs[i : i + BATCH], targets[i : i + BATCH])
        bits += float(batch_bits)
        load = load + np.asarray(batch_load)
    return bits, load


def pad(rows: list[list[int]], fill: int) -> np.ndarray:
    """Rows of different lengths as one int32 array, a whole number of batches high."""
    height = -(-len(rows) // BATCH) * BATCH
    padded = np.full((height, max(map(len, rows))), fill, np.int32)
    for row, values in zip(padded, rows, strict=False):
        row[: len(values)] = values
    return padded


def unigram_bits(train_ids: list[int], ids: list[int], vocab_size: int) -> float:
    """`-log2 p` of `ids` under the token frequencies of `train_ids`, each count plus one."""
    counts = np.bincount(train_ids, minlength=vocab_size) + 1
    return float(-np.log2(counts / counts.sum())[ids].sum())


def show_experts(model: Decoder, load: np.ndarray) -> None:
    """Which experts each device holds, and the rows that each got in each layer: `load [MoE layers, E]`."""
    print("\nexperts by device, and the rows that each got while measuring, a layer a column:")
    for shard in model.layers[0].moe.w_down[...].addressable_shards:
        for expert in range(*shard.index[0].indices(load.shape[1])):
            rows = "  ".join(f"{count:7d}" for count in load[:, expert])
            print(f"  {shard.device!s:12}  expert {expert:2d}  {rows}")
    print(f"  busiest over average, a layer: {'  '.join(f'{x:.2f}' for x in load.max(1) / load.mean(1))}")


def write(model: Decoder, tokenizer) -> None:
    engine = Engine(model)
    sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_new_tokens=120)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with tqdm(total=len(PROMPTS) * sampling.max_new_tokens, desc="writing", unit="token", file=sys.stderr) as bar:
        completions = engine.generate(prompts, sampling, progress=lambda tokens, _: bar.update(tokens))
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        print(f"{'-' * 72}\n{prompt}{tokenizer.decode(completion.token_ids, skip_special_tokens=True)}")
    print(f"{'-' * 72}\n{engine.stats.summary()}")


if __name__ == "__main__":
    main()
