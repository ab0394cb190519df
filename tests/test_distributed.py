"""Two real processes of four CPU devices each, joined over gloo, compute what one process computes.

This file is also the program that the processes run: `python tests/test_distributed.py ADDRESS PROCESS_ID JOBS.json`.
"""

import contextlib
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jax_epmoe import initialize_distributed, load_model, make_mesh
from jax_epmoe.generate import Engine, SamplingParams
from weights_convert import convert

PARITY = Path(__file__).parent / "parity" / "checkpoints"
REPOSITORY = Path(__file__).parents[1]
TIME_LIMIT = 150  # seconds, for a pair of processes
NEW_TOKENS = 12

# checkpoint, (tp_size, ep_size, dp_size): heads and experts over both processes, and a replica in each.
JOBS = [("deepseek_v2", (8, 8, 1)), ("mixtral", (4, 2, 2))]


def stored(name: str) -> dict[str, np.ndarray]:
    with np.load(PARITY / name / "expected.npz") as file:
        return dict(file)


def prompts_of(name: str) -> list[list[int]]:
    data = stored(name)
    return [ids[:n].tolist() for ids, n in zip(data["prompts"], data["prompt_lengths"], strict=True)]


def relative_error(got, want) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def compute(folder: str, name: str, sizes: tuple[int, int, int]) -> tuple[np.ndarray, list[list[int]]]:
    """The stored sequences' logits (the first one twice) and every prompt's greedy tokens; the same program for 1 or 2."""
    model = load_model(folder, mesh=make_mesh(*sizes), dtype=jnp.float32)
    graphdef, state = nnx.split(model)
    everywhere = jax.NamedSharding(model.mesh, jax.P())
    whole = jax.jit(lambda state, tokens: nnx.merge(graphdef, state)(tokens), out_shardings=everywhere)
    tokens = stored(name)["tokens"]
    logits = np.asarray(whole(state, np.concatenate([tokens, tokens[:1]])))
    sampling = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    completions = Engine(model, prefill_chunk=16).generate(prompts_of(name), sampling)
    return logits, [completion.token_ids for completion in completions]


def main(address: str, process_id: str, jobs: str) -> None:
    """Runs every job and leaves `PROCESS_ID.npz` and `PROCESS_ID.json` beside the list of jobs."""
    initialize_distributed(address, 2, int(process_id))
    assert (jax.process_count(), len(jax.devices()), len(jax.local_devices())) == (2, 8, 4)
    results = [compute(*job) for job in json.loads(Path(jobs).read_text())]
    place = Path(jobs).parent / process_id
    np.savez(place.with_suffix(".npz"), *[logits for logits, _ in results])
    place.with_suffix(".json").write_text(json.dumps([ids for _, ids in results]))


def run_pair(*commands) -> list[tuple[str, str]]:
    """Runs `command(address)` for both processes and returns what each wrote to its standard output and error."""
    flags = "--xla_force_host_platform_device_count=4"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "KUBERNETES_"))}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(REPOSITORY)}
    for _ in range(3):  # another program may take the port between our finding it and process 0's binding it
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{probe.getsockname()[1]}"
        statuses, outputs = _run([[sys.executable, *map(str, command(address))] for command in commands], environment)
        if not any(status and "bind" in errors.lower() for status, (_, errors) in zip(statuses, outputs, strict=True)):
            break
    report = "\n\n".join(
        f"process {i} exited with {status}:\n{errors[-4000:]}"
        for i, (status, (_, errors)) in enumerate(zip(statuses, outputs, strict=True))
    )
    assert statuses == [0] * len(commands), report
    return outputs


def _run(commands: list[list[str]], environment: dict[str, str]) -> tuple[list[int], list[tuple[str, str]]]:
    """Exit statuses, and standard outputs and errors; what has not ended within TIME_LIMIT is killed."""
    deadline = time.monotonic() + TIME_LIMIT
    with contextlib.ExitStack() as stack:
        files = [[stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in commands]
        processes = [
            subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=out, stderr=err)
            for command, (out, err) in zip(commands, files, strict=True)
        ]
        try:
            for process in processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        finally:
            for process in processes:
                process.kill()
        statuses = [process.wait() for process in processes]
        for file in itertools.chain(*files):
            file.seek(0)
        return statuses, [(out.read(), err.read()) for out, err in files]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """`converted[name]`: the folder of a parity checkpoint in our format."""
    folder = tmp_path_factory.mktemp("converted")
    for name in {name for name, _ in JOBS}:
        convert(PARITY / name, folder / name, progress=False)
    return {name: folder / name for name, _ in JOBS}


def test_two_processes_compute_the_stored_logits_and_greedy_tokens_as_one_does(converted, tmp_path):
    jobs = tmp_path / "jobs.json"
    jobs.write_text(json.dumps([(str(converted[name]), name, sizes) for name, sizes in JOBS]))
    run_pair(*[lambda address, i=i: [__file__, address, i, jobs] for i in range(2)])
    results = []
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as file:
            logits = [file[f"arr_{job}"] for job in range(len(JOBS))]
        results.append((logits, json.loads((tmp_path / f"{i}.json").read_text())))
    for job, (name, sizes) in enumerate(JOBS):
        want = stored(name)
        want_logits = np.concatenate([want["logits"], want["logits"][:1]])
        for i, (logits, ids) in enumerate(results):
            assert relative_error(logits[job], want_logits) < 1e-4, f"process {i}, {name} on {sizes}"
            assert ids[job] == want["greedy"].tolist(), f"process {i}, {name} on {sizes}"
    logits, ids = compute(str(converted[JOBS[0][0]]), *JOBS[0])
    assert relative_error(results[0][0][0], logits) < 1e-6
    assert results[0][1][0] == ids


def test_the_command_line_runs_over_two_processes_and_only_the_first_writes(converted, tmp_path):
    prompts = prompts_of("mixtral")
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"prompt_token_ids": ids}) + "\n" for ids in prompts))

    def command(i):
        return lambda address: [
            "-m", "jax_epmoe.generate", "--model", converted["mixtral"], "--tp-size", "8", "--ep-size", "4",
            "--dtype", "float32", "--input", tmp_path / "in.jsonl", "--output", tmp_path / f"out{i}.jsonl",
            "--max-new-tokens", str(NEW_TOKENS), "--prefill-chunk", "16", "--ignore-eos",
            "--coordinator-address", address, "--num-processes", "2", "--process-id", str(i),
        ]  # fmt: skip

    first, second = run_pair(command(0), command(1))
    lines = [json.loads(line) for line in (tmp_path / "out0.jsonl").read_text().splitlines()]
    assert [line["token_ids"] for line in lines] == stored("mixtral")["greedy"].tolist()
    assert not (tmp_path / "out1.jsonl").exists()
    assert "token_ids" not in first[0] + second[0]  # no more: gloo itself writes to standard output
    assert "tokens/s" in first[1]
    assert "tokens/s" not in second[1]


if __name__ == "__main__":
    main(*sys.argv[1:])
