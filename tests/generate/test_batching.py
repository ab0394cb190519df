import dataclasses

import numpy as np
import pytest

from jax_epmoe.generate.batching import Limits, bucket, check_prompts, chunk_lengths, make_requests, plan_runs
from jax_epmoe.generate.sampling import SamplingMode, SamplingParams

LIMITS = Limits(
    max_batch_size=8, replicas=2, prefill_chunk=32, max_prefill_tokens=256, context_length=512, decode_steps=4
)


def plan(lengths, *, new=10, most_slots=lambda length: 10**9, limits=LIMITS, params=None):
    requests = make_requests(
        [[1] * n for n in lengths],
        params or [SamplingParams(max_new_tokens=new)] * len(lengths),
        context_length=limits.context_length,
        eos_token_ids=(),
    )
    return list(plan_runs(requests, limits, most_slots))


def test_buckets_are_powers_of_two_between_two_ends():
    assert [bucket(n, 16, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]


def test_one_run_holds_all_and_its_shapes_are_buckets():
    ((requests, shapes),) = plan([3, 40, 5, 70, 4])
    assert [r.index for r in requests] == [0, 1, 2, 3, 4]
    assert (shapes.slots, shapes.slots_per_replica, shapes.cache_length, shapes.num_stop_ids) == (8, 4, 128, 4)
    assert (shapes.chunks, shapes.decode_steps, shapes.mode) == (((32, (8,)),), 4, SamplingMode())


def test_what_may_last_longest_begins_first():
    params = [SamplingParams(max_new_tokens=n) for n in (3, 9, 3, 20)]
    ((requests, _),) = plan([5] * 4, params=params)
    assert [r.index for r in requests] == [3, 1, 0, 2]


def test_a_prefill_call_has_as_many_rows_as_its_tokens_allow_and_few_when_few_slots_get_free():
    many = dataclasses.replace(LIMITS, max_batch_size=32, max_prefill_tokens=1000)
    assert plan([32] * 33, limits=many)[0][1].chunks == ((32, (6, 30)),)
    assert plan([32] * 32, limits=many)[0][1].chunks == ((32, (30,)),)
    assert plan([32] * 9)[0][1].chunks == ((32, (8,)),)
    ((_, shapes),) = plan([32] * 9, limits=dataclasses.replace(LIMITS, max_prefill_tokens=10))
    assert shapes.chunks == ((32, (2,)),)


def test_prompts_of_other_lengths_have_shorter_calls():
    assert chunk_lengths([32] * 5, 32) == [32]
    assert chunk_lengths([5, 6, 3, 32], 32) == [16, 32]
    assert chunk_lengths([500, 17, 20], 512) == [32, 512]
    assert chunk_lengths([5] * 9, 4) == [4]
    assert chunk_lengths([200] * 9, 100) == [100]


def test_the_cache_holds_all_but_the_last_new_token_and_never_more_than_the_context():
    assert plan([119], new=10)[0][1].cache_length == 128
    assert plan([120], new=10)[0][1].cache_length == 256
    assert plan([500], new=100)[0][1].cache_length == 512


def test_one_token_each_needs_no_decode_of_several():
    assert plan([9], new=4)[0][1].decode_steps == 1
    assert plan([9], new=5)[0][1].decode_steps == 4


def test_memory_bounds_the_slots_and_what_is_long_then_runs_by_itself():
    runs = plan([100, 300, 90, 80, 400], most_slots=lambda length: 1024 // length)
    assert [[r.index for r in requests] for requests, _ in runs] == [[1, 4], [0, 2, 3]]
    assert [(shapes.slots, shapes.cache_length) for _, shapes in runs] == [(2, 512), (4, 128)]
    assert plan([400], most_slots=lambda length: 0)[0][1].slots == 2  # one on each replica, and the memory will tell


def test_a_request_stops_at_its_own_tokens_the_models_and_the_contexts_end():
    params = [SamplingParams(stop_token_ids=(7, 3)), SamplingParams(stop_token_ids=(7,), ignore_eos=True)]
    requests = make_requests([[1], [1] * 90], params, context_length=100, eos_token_ids=(5, 3))
    assert [r.stop_ids for r in requests] == [(3, 5, 7), (7,)]
    assert [r.limit for r in requests] == [99, 10]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], r"^prompts\[1\]: number of tokens is 0; it should be at least 1$"),
        ([1] * 8, r"^prompts\[1\]: number of tokens is 8; it should be at most 7: one less than the context length$"),
        ([1, 11], r"^prompts\[1\]: token id is 11; it should be an integer from 0 to 10$"),
        ([-1], r"^prompts\[1\]: token id is -1; it should be an integer from 0 to 10$"),
        ([1.0], r"^prompts\[1\]: token id is 1.0; it should be an integer from 0 to 10$"),
    ],
)
def test_a_bad_prompt_is_one_line_that_names_it(prompt, message):
    with pytest.raises(ValueError, match=message):
        check_prompts([[1, 2], prompt], vocab_size=11, context_length=8)


def test_numpy_integers_are_token_ids():
    check_prompts([np.arange(5)], vocab_size=5, context_length=8)
