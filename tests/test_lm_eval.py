"""The lm-evaluation-harness adapter: with the harness itself where it is installed, else with a stand-in for its base class."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

CHECKPOINT = Path(__file__).parent / "parity" / "checkpoints" / "mixtral"
ROOT = Path(__file__).parents[1]
INSTALLED = importlib.util.find_spec("lm_eval") is not None

if not INSTALLED:
    from lm_eval_stand_in import install

    install()

from jax_epmoe.generate.scoring import Score  # noqa: E402
from jax_epmoe.lm_eval import EPMoELM, rolling_windows  # noqa: E402


def asking(*args):
    return SimpleNamespace(args=args)


def test_windows_predict_each_token_once_after_as_much_as_fits():
    assert list(rolling_windows([5, 6, 7, 8, 9], prefix=0, length=3)) == [([0], [5, 6, 7]), ([6, 7], [8, 9])]
    assert list(rolling_windows([], prefix=0, length=3)) == []
    for count in range(1, 30):
        tokens = list(range(1, count + 1))
        windows = list(rolling_windows(tokens, prefix=0, length=7))
        assert [token for _, predicted in windows for token in predicted] == tokens
        assert all(len(context) + len(predicted) - 1 == 7 for context, predicted in windows[1:])
        assert len(windows[0][1]) == min(count, 7)


@pytest.fixture(scope="module")
def model():
    """With random weights: what is tested is what it asks of them."""
    return EPMoELM(
        str(CHECKPOINT), load_format="dummy", dtype="float32", max_length=40, batch_tokens=256, max_gen_toks=6
    )


@pytest.fixture
def scored(model, monkeypatch):
    """The pairs of token ids that the model is asked to score; each gets minus its continuation's length."""
    seen = []

    def score(pairs, progress):
        seen.extend(pairs)
        progress(len(pairs))
        return [Score(-float(len(continuation)), len(continuation) == 1) for _, continuation in pairs]

    monkeypatch.setattr(model._scorer, "score", score)
    return seen


def test_pairs_are_scored_after_their_context_and_long_ones_lose_its_beginning(model, scored):
    encode = model.tok_encode
    answers = model.loglikelihood([asking("Mixture of", " experts"), asking("", "experts"), asking("a b " * 60, "c")])
    before, whole = encode("Mixture of"), encode("Mixture of experts")
    assert scored[0] == (before, whole[len(before) :])
    assert before[0] == model.tokenizer.bos_token_id
    assert scored[1] == ([model.tokenizer.bos_token_id], encode("experts", add_special_tokens=False))
    long, kept = encode("a b " * 60 + "c"), [*scored[2][0], *scored[2][1]]
    assert kept == long[-41:]
    assert [answer[0] for answer in answers] == [-len(continuation) for _, continuation in scored]


def test_a_whole_text_is_the_sum_of_its_windows(model, scored):
    text = "Experts are many, tokens are more. " * 4
    (total,) = model.loglikelihood_rolling([asking(text)])
    tokens = model.tok_encode(text, add_special_tokens=False)
    assert len(tokens) > 40
    assert [token for _, continuation in scored for token in continuation] == tokens
    assert total == -len(tokens)


def test_a_text_that_begins_with_bos_gets_no_other(model):
    bos = model.tokenizer.bos_token
    assert model.tok_encode(f"{bos}hi").count(model.tokenizer.bos_token_id) == 1
    assert model.tok_encode("hi").count(model.tokenizer.bos_token_id) == 1
    assert model.tok_encode("hi", add_special_tokens=False).count(model.tokenizer.bos_token_id) == 0


def test_a_tasks_generation_is_ours(model):
    prompt, params = model._generation(
        "hi", {"until": ["\n", ""], "max_gen_toks": 9, "do_sample": False, "temperature": 0.7}
    )
    assert prompt == model.tok_encode("hi")
    assert (params.max_new_tokens, params.stop, params.temperature) == (9, ("\n",), 0.0)
    _, params = model._generation("hi", {"until": "stop", "do_sample": True, "top_p": 0.9, "top_k": None})
    assert (params.max_new_tokens, params.stop, params.temperature, params.top_p) == (6, ("stop",), 1.0, 0.9)
    prompt, _ = model._generation("a b " * 60, {"max_gen_toks": 10})
    assert prompt == model.tok_encode("a b " * 60)[-30:]
    with pytest.raises(
        ValueError, match=r"a task's generation_kwargs is \['num_beams'\]; it should be among until, do_sample"
    ):
        model._generation("hi", {"num_beams": 4})
    with pytest.raises(ValueError, match="max_gen_toks is 40; it should be from 1 to 39"):
        model._generation("hi", {"max_gen_toks": 40})


def test_what_is_no_model_is_refused(tmp_path):
    shutil.copy(CHECKPOINT / "config.json", tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer; it should have the model's"):
        EPMoELM(str(tmp_path), load_format="dummy")
    with pytest.raises(ValueError, match="max_length is 1; it should be from 2 to the model's 512"):
        EPMoELM(str(CHECKPOINT), load_format="dummy", dtype="float32", max_length=1)


@pytest.mark.slow
def test_texts_end_before_their_stop_strings_and_are_those_that_score_best(model):
    whole, cut = model.generate_until([asking("Mixture", {"until": []}), asking("Mixture", {"until": ["@"]})])
    assert whole.startswith(cut)
    stop = whole[2:4]
    (short,) = model.generate_until([asking("Mixture", {"until": [stop]})])
    assert short == whole[: whole.index(stop)]
    prompt, params = model._generation("Mixture", {})
    (completion,) = model._engine.generate([prompt], params)
    (score,) = model._scorer.score([(prompt, completion.token_ids)])
    assert score.is_greedy
    assert np.isfinite(score.logprob)


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="the lm-evaluation-harness is not installed")
def test_the_harness_runs_a_task_file_of_our_own(tmp_path):
    """Three kinds of task, of the demo's model; held-out lines that it finds likelier than chance."""
    from weights_convert import convert

    convert(ROOT / "examples/demo/checkpoint", tmp_path / "demo", dtype="float32")
    tasks = "shakespeare_lines,shakespeare_perplexity,shakespeare_next"
    command = [sys.executable, "-m", "jax_epmoe.lm_eval", "run", "--model", "jax_epmoe", "--tasks", tasks]
    command += [
        "--model_args",
        f"pretrained={tmp_path / 'demo'},tp_size=2,ep_size=2",
        "--include_path",
        "tests/evaluation",
    ]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "JAX_PLATFORMS": "cpu"}
    subprocess.run([*command, "--output_path", str(tmp_path / "out")], cwd=ROOT, env=environment, check=True)
    (path,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(path.read_text())["results"]
    assert results["shakespeare_perplexity"]["bits_per_byte,none"] < 2
    assert results["shakespeare_lines"]["acc,none"] > 0.25
    assert results["shakespeare_next"]["exact_match,none"] < 1
