"""transformers on the same requests: `generate` in static batches, and its continuous batching, each on a model of random weights.

`python -m bench.transformers_peer` is a process of its own: it reads one JSON request from stdin and answers with a line of JSON for
each way, so that torch and JAX never hold a GPU's memory at the same time.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE, Popen, TimeoutExpired
from typing import Any

from bench.requests import Request, measured

ROOT = Path(__file__).resolve().parents[1]
STATIC, CONTINUOUS = "transformers generate", "transformers continuous batching"


def ask(
    model: Path, requests: Sequence[Request], *, dtype: str, batch_size: int, seconds: float, device: str = "cuda"
) -> dict[str, dict[str, Any]]:
    """What each way measured, or `{"failed": why}`: within `seconds` all in all."""
    request = {
        "model": str(model.resolve()),
        "prompts": [one.prompt for one in requests],
        "output_lens": [one.output_len for one in requests],
        "dtype": dtype,
        "batch_size": batch_size,
        "device": device,
    }
    process = Popen([sys.executable, "-m", __name__], cwd=ROOT, stdin=PIPE, stdout=PIPE, text=True)
    try:
        out, _ = process.communicate(json.dumps(request), timeout=seconds)
        missing = f"the process ended with status {process.returncode}"
    except TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        missing = f"not ready after {seconds:.0f} s"
    answers = {}
    for line in out.splitlines():
        answers |= json.loads(line)
    failed = answers.get("all", {"failed": missing})
    return {name: answers.get(name, failed) for name in (STATIC, CONTINUOUS)}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    asked = json.loads(sys.stdin.read())

    def answer(name: str, measure: Callable[[], Any]) -> Any:
        try:
            value = measure()
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(json.dumps({name: {"failed": message}}), file=answers, flush=True)
            return None
        if isinstance(value, dict):
            print(json.dumps({name: value}), file=answers, flush=True)
        return value

    requests = [Request(*pair) for pair in zip(asked["prompts"], asked["output_lens"], strict=True)]
    model = answer("all", lambda: _random_model(asked["model"], asked["dtype"], asked["device"]))
    if model is not None:
        answer(STATIC, lambda: _static(model, requests, asked["batch_size"]))
        answer(CONTINUOUS, lambda: _continuous(model, requests, asked["batch_size"]))


def _random_model(folder: str, dtype: str, device: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def _static(model: Any, requests: Sequence[Request], batch_size: int) -> dict[str, Any]:
    """`generate` on batches of requests of like lengths, each to the end of its longest; only tokens that were asked for count."""
    ordered = sorted(requests, key=lambda request: (request.output_len, len(request.prompt)), reverse=True)
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    _generate(model, [Request(request.prompt, 2) for request in batches[0]])  # compiles, loads and allocates
    _wait(model)
    start = time.perf_counter()
    for batch in batches:
        _generate(model, batch)
    _wait(model)
    seconds = time.perf_counter() - start
    return measured(STATIC, requests, sum(request.output_len for request in requests), seconds) | _about(model)


def _generate(model: Any, batch: Sequence[Request]) -> None:
    import torch

    width, new = max(len(one.prompt) for one in batch), max(one.output_len for one in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, one in enumerate(batch):
        ids[row, width - len(one.prompt) :] = torch.tensor(one.prompt)
        mask[row, width - len(one.prompt) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False)
    if out.shape[1] != width + new:
        raise RuntimeError(f"generate made {out.shape[1] - width} tokens; {new} were asked for")


def _continuous(model: Any, requests: Sequence[Request], batch_size: int) -> dict[str, Any]:
    """Its continuous batching, as many requests at a time as it thinks fit, at most `batch_size`."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    most = max(request.output_len for request in requests)
    generation = GenerationConfig(max_new_tokens=most, do_sample=False, eos_token_id=-1, pad_token_id=0)
    # On a CPU it would take nearly all memory for its cache.
    small = {} if model.device.type == "cuda" else {"num_blocks": 64, "max_batch_tokens": 256}
    how = ContinuousBatchingConfig(max_requests_per_batch=batch_size, **small)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=how, block=True, timeout=30, warmup=True
    ) as manager:
        manager.add_request(requests[0].prompt, max_new_tokens=2)  # starts what is left to start
        _finished(manager, 1)
        start = time.perf_counter()
        for request in requests:
            manager.add_request(request.prompt, max_new_tokens=request.output_len)
        made = _finished(manager, len(requests))
        seconds = time.perf_counter() - start
    wanted = sum(request.output_len for request in requests)
    if made != wanted:
        raise RuntimeError(f"continuous batching made {made} tokens; {wanted} were asked for")
    return measured(CONTINUOUS, requests, made, seconds) | _about(model)


def _finished(manager: Any, count: int) -> int:
    """Waits for that many results; the tokens in them."""
    made = 0
    while count:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("the manager has stopped")
            continue
        if result.error is not None:
            raise RuntimeError(result.error)
        if result.is_finished():
            made += len(result.generated_tokens)
            count -= 1
    return made


def _wait(model: Any) -> None:
    import torch

    if model.device.type == "cuda":
        torch.cuda.synchronize()


def _about(model: Any) -> dict[str, Any]:
    import torch
    import transformers

    return {
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "attention": getattr(model.config, "_attn_implementation", None),
        "experts": getattr(model.config, "_experts_implementation", None),
    }


if __name__ == "__main__":
    main()
