import pytest

from jax_epmoe.generate.batching import Request
from jax_epmoe.generate.sampling import SamplingParams
from jax_epmoe.generate.scheduler import Running
from jax_epmoe.generate.stopping import first_stop, read_tokens

WORDS = ["he", "llo", " wor", "ld", "", "</", "end", ">"]


def detokenize(prompt, ids):
    return "".join(WORDS[i] for i in ids)


def running(limit=100, stop_ids=(), **params) -> Running:
    return Running(Request(0, 0, (1, 2), SamplingParams(**params), limit, stop_ids), [])


def test_tokens_end_at_none_at_a_stop_token_and_at_the_limit():
    one = running(stop_ids=(7,), stop_token_ids=(7,))
    assert (read_tokens(one, [1, 2, -1], None, None), one.finish_reason) == (2, None)
    assert (read_tokens(one, [3, 7, 5], None, None), one.finish_reason, one.stop_reason) == (2, "stop", 7)
    assert one.token_ids == [1, 2, 3, 7]
    eos = running(stop_ids=(7,))
    assert (read_tokens(eos, [7], None, None), eos.finish_reason, eos.stop_reason) == (1, "stop", None)
    short = running(limit=3)
    assert (read_tokens(short, [1, 1, 1, -1], None, None), short.finish_reason) == (3, "length")


@pytest.mark.parametrize(
    "calls", [[[0, 1, 2, 3, 4, 5, 6, 7, 0]], [[0, 1, 2, 3], [4, 5], [6, 7, 0]], [[i] for i in range(8)]]
)
def test_a_stop_string_ends_a_text_with_the_token_that_completes_it(calls):
    one = running(stop=("never", "d</end>"))
    counts = [read_tokens(one, tokens, None, detokenize) for tokens in calls]
    assert (one.token_ids, one.finish_reason, one.stop_reason) == ([0, 1, 2, 3, 4, 5, 6, 7], "stop", "d</end>")
    assert sum(counts) == 8


def test_a_stop_string_takes_back_a_later_end_and_its_log_probabilities():
    one = running(limit=4, stop=("lo w",), logprobs=1)
    told = [(-0.1 * i, [5, 6], [-0.5, -0.6]) for i in range(4)]
    assert read_tokens(one, [0, 1, 2, 3], told, detokenize) == 3
    assert (one.finish_reason, one.stop_reason, one.token_ids) == ("stop", "lo w", [0, 1, 2])
    assert one.logprobs == [{0: 0.0, 5: -0.5}, {1: -0.1, 5: -0.5}, {2: -0.2, 5: -0.5}]


def test_of_several_stop_strings_the_first_in_the_text_counts():
    assert first_stop("hello world", ["world", "lo"]) == (3, "lo")
    assert first_stop("hello", ["x"]) == (5, None)
