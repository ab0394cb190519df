import numpy as np
import pytest

from jax_epmoe.generate.batching import Chunk, bucket, check_prompts, make_requests, plan_batches
from jax_epmoe.generate.sampling import SamplingParams


def plan(lengths, *, new=10, max_batch_size=4, replicas=1, prefill_chunk=32, context_length=512):
    requests = make_requests(
        [[1] * n for n in lengths], SamplingParams(max_new_tokens=new), context_length=context_length, eos_token_ids=()
    )
    return plan_batches(
        requests,
        max_batch_size=max_batch_size,
        replicas=replicas,
        prefill_chunk=prefill_chunk,
        context_length=context_length,
    )


def test_buckets_are_powers_of_two_between_two_ends():
    assert [bucket(n, 16, 100) for n in (1, 16, 17, 64, 65, 100)] == [16, 16, 32, 64, 100, 100]


def test_batches_hold_like_lengths_longest_first():
    batches = plan([3, 40, 5, 70, 4])
    assert [[r.index for r in batch.requests] for batch in batches] == [[3, 1, 2, 4], [0]]
    assert [batch.size for batch in batches] == [4, 1]


def test_a_long_prompt_takes_several_chunks_and_the_last_is_as_short_as_it_can_be():
    assert plan([70])[0].chunks == (Chunk(0, 32), Chunk(32, 32), Chunk(64, 16))
    assert plan([5], prefill_chunk=4)[0].chunks == (Chunk(0, 4), Chunk(4, 4))


def test_the_cache_holds_all_but_the_last_new_token_and_never_more_than_the_context():
    assert plan([119], new=10)[0].cache_length == 128
    assert plan([120], new=10)[0].cache_length == 256
    assert plan([500], new=100, context_length=510)[0].cache_length == 510


def test_rows_are_dealt_round_the_replicas():
    batch = plan([9, 8, 7, 6, 5], max_batch_size=7, replicas=2)[0]
    assert (batch.size, batch.rows) == (8, (0, 4, 1, 5, 2))
    np.testing.assert_array_equal(batch.column([1, 2, 3, 4, 5], np.int32, -1), [1, 3, 5, -1, 2, 4, -1, -1])
    np.testing.assert_array_equal(batch.tokens(Chunk(0, 16)).sum(axis=1), [9, 7, 5, 0, 8, 6, 0, 0])


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
