"""`Engine`: prompts to token ids by continuous batching, on the mesh of a decoder. See docs/generation.md.

Sequences run in slots, each with its rows of one cache. Between two steps those that have ended leave and those that wait enter;
a step is a prefill call, a decode call of several tokens, or both (`scheduler.py` says which, `programs.py` what they do). The
host dispatches a step without waiting for the one before and reads its tokens while the next one runs.

Several processes run the same program with the same prompts, and each gets every completion: what is decided depends on the
tokens that all of them have read, never on time.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jax_epmoe.config import require
from jax_epmoe.generate.batching import Limits, Request, check_prompts, check_sizes, make_requests, plan_runs
from jax_epmoe.generate.programs import COPIES, Call, Programs
from jax_epmoe.generate.run import Completion, Run, Update
from jax_epmoe.generate.sampling import SamplingParams
from jax_epmoe.generate.scheduler import Scheduler
from jax_epmoe.generate.stats import Stats, free_memory
from jax_epmoe.generate.stopping import Detokenize

# Called with how many output tokens came and how many requests finished since the last call.
Progress = Callable[[int, int], None]


class Engine:
    """Generates from a decoder; compiled programs are kept from call to call.

    `engine.stats` tells of the last call, `engine.num_programs` how many programs have been compiled.
    """

    def __init__(
        self,
        model: Any,
        *,
        max_batch_size: int = 256,
        prefill_chunk: int = 512,
        max_prefill_tokens: int = 8192,
        context_length: int | None = None,
        eos_token_ids: Sequence[int] | None = None,
        kv_cache_dtype: str = "auto",
        num_continuous_decode_steps: int = 4,
        prefix_cache: bool = True,
        mem_fraction_static: float = 0.85,
        detokenize: Detokenize | None = None,
        expert_load: Any | None = None,
    ):
        """
        Args:
          model: a `Decoder`, or what has its `config`, `mesh`, `batch_multiple`, `init_cache`, `hidden` and `logits`.
          max_batch_size: sequences that run together, rounded up to a multiple of the model's `batch_multiple`; fewer where
            the memory does not hold their cache.
          prefill_chunk: how many tokens of each prompt one prefill call takes at the most.
          max_prefill_tokens: how many of all prompts, padding counted.
          context_length: the most positions of a prompt and its continuation; by default, and at most, the model's.
          eos_token_ids: which tokens end a text; the model's by default.
          kv_cache_dtype: as the model's `init_cache` takes it: "auto" is the model's dtype, "fp8" float8 with scales.
          num_continuous_decode_steps: tokens that one decode call makes for each sequence, without the host.
          prefix_cache: what prompts of one call share at their beginning is computed once and copied.
          mem_fraction_static: the part of a device's memory that weights and cache may take.
          detokenize: (the prompt's ids, new ids) -> the new ids' text; for stop strings.
          expert_load: its `add` is told of the rows of each expert in every step, `[MoE layers, E]`; the model then has
            `hidden_with_load` too.

        Raises:
          ValueError: a size out of its range, or a `kv_cache_dtype` that does not exist.
        """
        sizes = {
            "max_batch_size": max_batch_size,
            "prefill_chunk": prefill_chunk,
            "max_prefill_tokens": max_prefill_tokens,
            "num_continuous_decode_steps": num_continuous_decode_steps,
        }
        self.config = model.config
        self.context_length = check_sizes(model.config, context_length=context_length, **sizes)
        fraction = mem_fraction_static
        require(0 < fraction <= 1, "mem_fraction_static", fraction, "more than 0 and at most 1")
        self.mesh = model.mesh
        self.eos_token_ids = tuple(self.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self.stats = Stats()
        self.programs = Programs(model, kv_cache_dtype, with_load=expert_load is not None)
        self.limits = Limits(
            max_batch_size=max_batch_size,
            replicas=model.batch_multiple,
            prefill_chunk=prefill_chunk,
            max_prefill_tokens=max_prefill_tokens,
            context_length=self.context_length,
            decode_steps=num_continuous_decode_steps,
        )
        self._prefix_cache = prefix_cache
        self._memory_fraction = mem_fraction_static
        self._detokenize = detokenize
        self._expert_load = expert_load
        self._aborted: set[int] = set()

    @property
    def num_programs(self) -> int:
        return len(self.programs.compiled)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Completion]:
        """Continues every prompt.

        Args:
          prompts: token ids, of any lengths.
          sampling: for all prompts, or one each; greedy by default.
          progress: is told of tokens and finished requests as they come.
          indices: for each prompt the number that its draws depend on beside the seed; by default its place among the prompts.
            What is left of a longer list gets the same draws as in it when it is given its places there.

        Returns:
          Completions, in the order of the prompts.

        Raises:
          ValueError: an empty prompt, one that leaves the context no room for a token, a token id outside the vocabulary, or
            stop strings without `detokenize`.
        """
        completions = dict(self.stream(prompts, sampling, progress=progress, indices=indices))
        return [completions[index] for index in range(len(prompts))]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
        indices: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Completion]]:
        """As `generate`, but yields each prompt's place among the prompts and its completion, when it has finished.

        Prompts are checked at once; work is done while the iterator is asked for more, and ends when it is closed.
        """
        updates = self.stream_tokens(prompts, sampling, progress=progress, indices=indices)
        return ((update.index, update.completion) for update in updates if update.completion is not None)

    def stream_tokens(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
        indices: Sequence[int] | None = None,
    ) -> Iterator[Update]:
        """As `stream`, but yields each prompt's new token ids as they are read, and with the last of them its completion."""
        requests = self.requests(prompts, sampling, indices)
        self.stats = Stats(requests=len(requests), prompt_tokens=sum(len(r.prompt) for r in requests))
        self._aborted = set()
        return self._stream(requests, progress)

    def abort(self, index: int) -> None:
        """Ends the prompt at `index` of the stream that is being read; its completion, "abort", comes with the next updates.

        One that has ended already stays as it is. With several processes, all must do so between the same two updates.
        """
        self._aborted.add(index)

    def warm_up(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> None:
        """Compiles every program that `generate` may need for these prompts, or for others of their lengths, and no other."""
        for scheduler in self._compiled_runs(self.requests(prompts, sampling)):
            self._run(scheduler)  # makes a cache, and drops it

    def requests(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        indices: Sequence[int] | None = None,
    ) -> list[Request]:
        """What `generate` makes of its arguments, checked."""
        check_prompts(prompts, vocab_size=self.config.vocab_size, context_length=self.context_length)
        requests = make_requests(
            prompts,
            SamplingParams() if sampling is None else sampling,
            context_length=self.context_length,
            eos_token_ids=self.eos_token_ids,
            indices=indices,
        )
        for request in requests:
            stop = request.sampling.stop
            require(not stop or self._detokenize is not None, "stop", stop, "empty where there is no tokenizer")
        return requests

    def _stream(self, requests: list[Request], progress: Progress | None) -> Iterator[Update]:
        for scheduler in self._compiled_runs(requests):
            run = self._run(scheduler)
            for updates in run.steps():
                if progress is not None:
                    done = sum(update.completion is not None for update in updates)
                    progress(sum(len(update.token_ids) for update in updates), done)
                before = time.perf_counter()
                yield from updates
                run.paused += time.perf_counter() - before
            del run  # its cache, before the next one is made
        if requests:
            self.stats.first_token_seconds /= len(requests)

    def _run(self, scheduler: Scheduler) -> "Run":
        return Run(self.programs, scheduler, self.stats, self._detokenize, self._expert_load, self._aborted)

    def _compiled_runs(self, requests: list[Request]) -> list[Scheduler]:
        before = time.perf_counter()
        runs = []
        for now, shapes in plan_runs(requests, self.limits, self._most_slots):
            scheduler = Scheduler(now, shapes, prefix_cache=self._prefix_cache)
            self.programs.compile(shapes, program_calls(scheduler))
            runs.append(scheduler)
        self.stats.compile_seconds += time.perf_counter() - before
        return runs

    def _most_slots(self, cache_length: int) -> int:
        """How many slots of so many positions the memory holds: at least one on each replica's devices."""
        free = free_memory(self.mesh.devices.flat, self._memory_fraction)
        if free is None:
            return 2**31
        return self.limits.replicas * max(1, free // self.programs.slot_bytes(cache_length))


def program_calls(scheduler: Scheduler) -> Iterator[Call]:
    """Every call that a run may make."""
    shapes = scheduler.shapes
    for kind in ("start", "continue") if scheduler.continues else ("start",):
        for chunk, sizes in shapes.chunks:
            yield from (Call(kind, rows, chunk) for rows in sizes)
    if scheduler.decodes:
        yield Call("decode", length=shapes.decode_steps)
    if scheduler.shares_prefixes:
        yield Call("copy", shapes.replicas * COPIES)
