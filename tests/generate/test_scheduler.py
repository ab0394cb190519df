"""The scheduler alone, with a model of what the devices hold: who runs where, and what is in each slot's cache."""

import numpy as np
import pytest

from jax_epmoe.generate.batching import Limits, make_requests, plan_runs
from jax_epmoe.generate.prefix_cache import BLOCK, PrefixCache, shared_blocks
from jax_epmoe.generate.sampling import SamplingParams
from jax_epmoe.generate.scheduler import Scheduler


def make(prompts, params=None, *, prefix_cache=True, **limits):
    sizes = {"max_batch_size": 4, "replicas": 1, "prefill_chunk": 32, "max_prefill_tokens": 64, "decode_steps": 4}
    limits = Limits(**{**sizes, "context_length": 512, **limits})
    requests = make_requests(prompts, params or SamplingParams(max_new_tokens=9), context_length=512, eos_token_ids=())
    ((ordered, shapes),) = plan_runs(requests, limits, lambda length: 10**9)
    return Scheduler(ordered, shapes, prefix_cache=prefix_cache)


class Devices:
    """Runs calls as the devices would, and checks that each finds what it counts on."""

    def __init__(self, scheduler: Scheduler):
        self.scheduler = scheduler
        self.cache: list[list] = [[] for _ in range(scheduler.shapes.slots)]
        self.computed: dict[int, int] = {}  # prompt tokens, by request
        self.made: dict[int, int] = {}

    def run(self, prefill, decode) -> list:
        """Returns whose prompts ended."""
        ended = []
        if prefill is not None:
            shapes = self.scheduler.shapes
            per = len(prefill.rows) // shapes.replicas
            for source, target in prefill.copies:
                assert source // shapes.slots_per_replica == target // shapes.slots_per_replica
                self.cache[target] = list(self.cache[source])
            for i, row in enumerate(prefill.rows):
                if row is None:
                    continue
                prompt = list(row.running.request.prompt)
                assert i // per == row.slot // shapes.slots_per_replica, "not on its slot's device"
                assert 0 < row.length <= prefill.chunk
                assert prefill.is_start == (row.start == 0)
                assert self.cache[row.slot][: row.start] == prompt[: row.start], "what should be there is not"
                self.cache[row.slot] = prompt[: row.start + row.length]
                index = row.running.request.index
                self.computed[index] = self.computed.get(index, 0) + row.length
                if row.ends:
                    ended.append(row.running)
                    self.made[index] = 1
        for slot, running in () if decode is None else decode.rows:
            prompt = list(running.request.prompt)
            assert self.cache[slot][: len(prompt)] == prompt
            self.made[running.request.index] += self.scheduler.shapes.decode_steps
            self.cache[slot] = [*prompt, *["new"] * self.made[running.request.index]]
        return ended


def run_all(scheduler: Scheduler, stop=lambda running: False) -> Devices:
    devices = Devices(scheduler)
    for _ in range(10_000):
        prefill, decode = scheduler.next_calls()
        if prefill is None and decode is None:
            break
        devices.run(prefill, decode)
        for running in list(scheduler.requests.values()):
            if running.finish_reason is None and stop(running):
                running.finish_reason = "stop"
                scheduler.end(running)
    assert scheduler.is_empty
    assert scheduler.num_free == scheduler.shapes.slots
    return devices


@pytest.mark.parametrize("replicas", [1, 4])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_whatever_ends_when_every_prompt_is_computed_and_no_slot_leaks(replicas, prefix_cache):
    rng = np.random.default_rng(replicas)
    beginnings = [rng.integers(0, 50, 200).tolist() for _ in range(3)]
    prompts = []
    for _ in range(300):
        beginning = beginnings[rng.integers(3)][: rng.integers(0, 200)] if rng.random() < 0.6 else []
        prompts.append([*beginning, *rng.integers(0, 50, rng.integers(1, 100)).tolist()])
    params = [
        SamplingParams(max_new_tokens=int(rng.integers(1, 50)), repetition_penalty=rng.choice([1.0, 1.0, 1.5]))
        for _ in prompts
    ]
    scheduler = make(prompts, params, max_batch_size=16, replicas=replicas, prefix_cache=prefix_cache)
    devices = run_all(scheduler, stop=lambda running: rng.random() < 0.01)
    reused = 0
    for running in scheduler.requests.values():
        index, length = running.request.index, len(running.request.prompt)
        if running.finish_reason is None:
            assert devices.computed[index] + running.reused == length
            assert devices.made[index] >= running.request.limit
        reused += running.reused or 0
        assert not (running.reused and running.request.sampling.repetition_penalty != 1)
    assert (reused > 1000) == prefix_cache


def test_slots_are_free_as_soon_as_a_call_makes_the_last_token():
    scheduler = make([[1], [2], [3], [4], [5]], max_batch_size=2)
    assert scheduler.shapes.slots == 2
    starts = []
    for step in range(9):
        prefill, _ = scheduler.next_calls()
        starts += [(step, row.running.request.index) for row in (prefill.rows if prefill else ()) if row]
    # 1 token by prefill and 8 by two calls of 4.
    assert starts == [(0, 0), (0, 1), (2, 2), (2, 3), (4, 4)]


def test_decode_waits_while_most_of_what_runs_is_still_in_prefill():
    scheduler = make([[1] * 30, [2] * 90, [3] * 90, [4] * 90], SamplingParams(max_new_tokens=99), max_prefill_tokens=32)
    kinds = []
    for _ in range(10):
        prefill, decode = scheduler.next_calls()
        kinds.append((prefill is not None, decode is not None))
    # The first prompt takes one call and the others three each: after the seventh call, three can decode.
    assert kinds == [(True, False)] * 6 + [(True, True)] * 4
    assert scheduler.shapes.chunk == 32


def test_prompts_with_one_beginning_compute_it_once_on_each_replica():
    beginning = list(range(64))
    prompts = [[*beginning, 100 + i] for i in range(8)]
    devices = run_all(make(prompts, max_batch_size=8, replicas=2))
    assert sorted(devices.computed.values()) == [1, 1, 1, 1, 1, 1, 65, 65]
    devices = run_all(make(prompts, max_batch_size=8, replicas=2, prefix_cache=False))
    assert sorted(devices.computed.values()) == [65] * 8


def test_what_a_free_slot_holds_is_used_where_it_is():
    beginning = list(range(48))
    scheduler = make([[*beginning, 100 + i] for i in range(3)], max_batch_size=1)
    devices, copies = Devices(scheduler), []
    while not scheduler.is_empty:
        prefill, decode = scheduler.next_calls()
        copies += prefill.copies if prefill else []
        devices.run(prefill, decode)
    assert copies == []
    assert devices.computed == {0: 49, 1: 1, 2: 1}


def test_who_waits_for_one_that_is_aborted_goes_on_alone():
    beginning = list(range(96))
    scheduler = make([[*beginning, 100 + i] for i in range(3)])
    devices = Devices(scheduler)
    prefill, _ = scheduler.next_calls()
    assert [row.running.request.index for row in prefill.rows if row] == [0]
    devices.run(prefill, None)
    assert scheduler.end(scheduler.requests[0])
    while not scheduler.is_empty:
        devices.run(*scheduler.next_calls())
    assert devices.computed[1] + devices.computed[2] == 97 - 32 + 97 - 96
    assert not scheduler.end(scheduler.requests[0])


def test_blocks_are_shared_only_where_enough_of_a_prompt_is():
    same = list(range(40))
    keys = shared_blocks([same, [*same[:33], 7, 7], [9] * 40, [*same[:16], *[8] * 60]])
    assert [len(own) for own in keys] == [2, 2, 0, 0]
    assert keys[0] == keys[1]
    assert shared_blocks([[1] * BLOCK, [1] * BLOCK]) == [[], []]  # the last token is always computed


def test_a_cache_knows_what_is_there_and_what_is_coming():
    prefixes = PrefixCache()
    a, b, c = b"a", b"b", b"c"
    prefixes.assign(3, [a, b], 0)
    assert prefixes.find([a, b, c], [3]) == (-1, 0)
    assert prefixes.find_coming([a, b, c], [3]) == (3, 2 * BLOCK)
    assert prefixes.find_coming([a, b, c], [2]) == (-1, 0)
    prefixes.fill(3, 2 * BLOCK - 1)
    assert prefixes.find([a, b, c], [3]) == (3, BLOCK)
    prefixes.release(3)
    assert prefixes.find_coming([a, b, c], [3]) == (3, BLOCK)
    prefixes.assign(3, [c], BLOCK)
    assert prefixes.find_coming([a, b], [3]) == (-1, 0)
    assert prefixes.find([c], [3]) == (3, BLOCK)
