"""`LLM` on a converted checkpoint: texts, token ids, chats and streams, against transformers' stored answers."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

import jax_epmoe as ep
from jax_epmoe.generate import Completion
from weights_convert import convert

CHECKPOINT = Path(__file__).parents[1] / "parity" / "checkpoints" / "mixtral"
GREEDY = ep.SamplingParams(max_tokens=12, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "mixtral"
    convert(CHECKPOINT, target, dtype="float32")
    return target


@pytest.fixture(scope="module")
def llm(folder):
    return ep.LLM(folder, prefill_chunk=16, prefix_cache=False)


@pytest.fixture(scope="module")
def expected():
    return np.load(CHECKPOINT / "expected.npz", allow_pickle=False)


def test_texts_and_token_ids_get_what_transformers_says(llm, expected):
    prompts = [str(text) for text in expected["prompt_text"]]
    outputs = llm.generate(prompts, GREEDY)
    assert [output.token_ids for output in outputs] == expected["greedy"].tolist()
    assert [output.text for output in outputs] == [str(text) for text in expected["greedy_text"]]
    assert [(output.index, output.prompt) for output in outputs] == list(enumerate(prompts))
    ids = [output.prompt_token_ids for output in outputs]
    again = llm.generate(prompt_token_ids=ids, sampling_params=GREEDY)
    assert [output.text for output in again] == [output.text for output in outputs]
    assert {output.prompt for output in again} == {None}
    assert [output.prompt_tokens for output in again] == list(map(len, ids))

    # A text is cut before a stop string, and what grows ends as it would have come.
    text = outputs[0].text
    stop = text[len(text) // 2 :][:3]
    stopped = llm.generate(prompts, GREEDY.replace(stop=stop))[0]
    assert (stopped.text, stopped.finish_reason, stopped.stop_reason) == (text[: text.index(stop)], "stop", stop)
    assert len(stopped.token_ids) < 12
    growing = list(llm.stream(prompts, GREEDY, deltas=True))
    for i, output in enumerate(outputs):
        texts = [part.text for part in growing if part.index == i]
        assert len(texts) > 2
        assert all(whole.startswith(part) for part, whole in itertools.pairwise(texts))
        assert texts[-1] == output.text
    assert sorted(o.index for o in llm.stream(prompts, GREEDY)) == list(range(len(prompts)))


def test_a_chat_is_written_by_the_template(llm, expected, monkeypatch):
    seen = []

    def generate(prompts, sampling, progress):
        seen.extend(prompts)
        return [Completion([67], "length", len(prompt)) for prompt in prompts]

    monkeypatch.setattr(llm.engine, "generate", generate)
    messages = json.loads(str(expected["chat_messages"]))
    (one,) = llm.chat(messages, GREEDY)
    assert one.prompt_token_ids == expected["chat_ids"].tolist()
    assert [output.text for output in llm.chat([messages, messages], GREEDY)] == [one.text] * 2
    assert seen == [expected["chat_ids"].tolist()] * 3


def test_random_weights_need_only_a_config(tmp_path):
    (tmp_path / "config.json").write_bytes((CHECKPOINT / "config.json").read_bytes())
    llm = ep.LLM(tmp_path, load_format="dummy", dtype="float32", max_batch_size=2)
    (output,) = llm.generate(prompt_token_ids=[[1, 2, 3]], sampling_params=ep.SamplingParams(max_tokens=1, logprobs=2))
    assert (output.text, len(output.token_ids)) == (None, 1)
    assert [len(told) in (2, 3) and max(told.values()) < 0 for told in output.logprobs] == [True]
    with pytest.raises(ValueError, match="has no tokenizer"):
        llm.generate("a")
    with pytest.raises(ValueError, match=r"^--chat needs a tokenizer|chat template"):
        llm.chat([{"role": "user", "content": "hi"}])
    with pytest.raises(
        ValueError, match=r"^prompts and prompt_token_ids is 'both or neither'; it should be one of them$"
    ):
        llm.generate()
    with pytest.raises(ValueError, match=r"^load_format is 'x'; it should be one of auto, dummy$"):
        ep.LLM(tmp_path, load_format="x")
    with pytest.raises(ValueError, match=r"^model is .*; it should be a folder with a config.json$"):
        ep.LLM(tmp_path / "none")
