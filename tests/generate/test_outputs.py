"""Files that are valid whatever ends a run, OpenAI's batch format, bad lines, and what else watches a run."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hash_model import HashModel

from jax_epmoe import make_mesh
from jax_epmoe.generate import Completion, Engine, cli
from jax_epmoe.generate.expert_load import read_expert_load
from jax_epmoe.generate.inputs import read_entries

MODEL = Path(__file__).parents[1] / "parity" / "checkpoints" / "mixtral"

# The CLI with the model of hash_model.py, in a process of its own; after each completion it waits.
PROGRAM = """
import sys, time
from hash_model import HashModel
from jax_epmoe import make_mesh
from jax_epmoe.generate import Engine, cli
class Slow(Engine):
    def stream(self, *args, **kwargs):
        for done in super().stream(*args, **kwargs):
            yield done
            time.sleep(0.05)
cli._make_engine = lambda args, *rest: Slow(HashModel(make_mesh(), vocab=269), max_batch_size=2)
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def engine():
    return Engine(HashModel(make_mesh(), vocab=269), max_batch_size=2)


@pytest.fixture
def quick(monkeypatch, engine):
    """The CLI with a model that needs no weights, two prompts at a time."""
    monkeypatch.setattr(cli, "_make_engine", lambda *args: engine)


def call(source, target, *args, tokenizer=False):
    """The arguments, with a model's folder that has no tokenizer unless asked."""
    model = MODEL if tokenizer else source.parent / "model"
    if not model.exists():
        model.mkdir()
        shutil.copy(MODEL / "config.json", model)
    return ["--model", str(model), "--input", str(source), "--output", str(target), "--max-new-tokens", "5", *args]


def run(source, target, *args, **kwargs):
    assert cli.main(call(source, target, *args, **kwargs)) == 0
    return [json.loads(line) for line in target.read_text().splitlines()]


def error_of(capsys, source, target, *args, **kwargs):
    capsys.readouterr()
    assert cli.main(call(source, target, *args, **kwargs)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err.removeprefix("epmoe-generate: error: ").rstrip()


def write(path, records):
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def prompts(count):
    """Prompts of many lengths; every other one is sampled, and the first gets more tokens than the others."""
    return [
        {
            "prompt_token_ids": [i, *range(1, 2 + i * 7 % 13)],
            "id": i,
            "temperature": 1.5 * (i % 2),
            "seed": i // 5,
            "max_new_tokens": 5 if i else 14,
        }
        for i in range(count)
    ]


@pytest.mark.parametrize("order", ["input", pytest.param("finished", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_to_the_same_file(tmp_path, quick, capsys, order):
    source = write(tmp_path / "in.jsonl", prompts(20))
    whole, target = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(source, whole, "--output-order", order)
    command = [sys.executable, "-c", PROGRAM, *call(source, target, "--output-order", order)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (target.exists() and target.read_bytes().count(b"\n") >= 5):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = target.read_bytes().splitlines(keepends=True)
    assert 5 <= len(kept) < 20
    assert {json.loads(line)["id"] for line in kept} <= set(range(20))
    target.write_bytes(target.read_bytes() + kept[0][:17])  # as if a line had been cut short
    assert len(run(source, target, "--output-order", order, "--resume")) == 20
    if order == "input":
        assert target.read_bytes() == whole.read_bytes()
    else:
        lines = target.read_bytes().splitlines(keepends=True)
        assert lines[: len(kept)] == kept
        assert sorted(lines) == sorted(whole.read_bytes().splitlines(keepends=True))
    assert {path.name for path in tmp_path.iterdir()} == {"model", "in.jsonl", "whole.jsonl", "out.jsonl"}
    assert f"prompts      {20 - len(kept)} of" in capsys.readouterr().err


def test_a_finished_file_is_left_alone_and_no_model_is_loaded(tmp_path, quick, monkeypatch, capsys):
    source, target = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    run(source, target)
    before = target.read_bytes()
    monkeypatch.setattr(cli, "_make_engine", None)
    run(source, target, "--resume")
    assert target.read_bytes() == before
    assert "all 3 answers are in" in capsys.readouterr().err


def test_an_output_that_is_there_is_neither_overwritten_nor_mixed_with_others(tmp_path, quick, capsys):
    source, target = write(tmp_path / "in.jsonl", prompts(3)), tmp_path / "out.jsonl"
    run(source, target)
    before = target.read_bytes()
    assert "which is there; it should be a new file, or --resume given" in error_of(capsys, source, target)
    for change in ({"seed": 9, "top_k": 3}, {"prompt_token_ids": [5]}):
        write(source, [{**record, **change} for record in prompts(3)])
        told = error_of(capsys, source, target, "--resume")
        assert told.startswith(f"--resume: {target} line 1 is 'resume_key 0-")
        assert told.endswith("it should be an answer to a prompt of this input with these parameters")
    target.write_text('{"text": "old"}\n')
    assert "line 1 is 'a line without a resume_key'" in error_of(capsys, source, target, "--resume")
    target.write_bytes(before + before)
    write(source, prompts(3))
    assert "it should be there once" in error_of(capsys, source, target, "--resume")
    assert target.read_bytes() == before + before


def test_ctrl_c_leaves_what_is_done_and_says_how_to_go_on(tmp_path, quick, monkeypatch, capsys):
    source, target, whole = write(tmp_path / "in.jsonl", prompts(6)), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    run(source, whole)
    stream = Engine.stream

    def interrupted(*args, **kwargs):
        for count, done in enumerate(stream(*args, **kwargs)):
            if count == 3:
                raise KeyboardInterrupt
            yield done

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "stream", interrupted)
        assert cli.main(call(source, target)) == 130
    told = f"\nepmoe-generate: interrupted: {target} holds 3 of 6 answers; the same command with --resume goes on\n"
    assert capsys.readouterr().err.endswith(told)
    assert len(target.read_text().splitlines()) == 3
    run(source, target, "--resume")
    assert target.read_bytes() == whole.read_bytes()


def test_two_runs_do_not_write_one_file(tmp_path, quick, monkeypatch, capsys):
    source, target = write(tmp_path / "in.jsonl", prompts(2)), tmp_path / "out.jsonl"
    stream, told = Engine.stream, []

    def meanwhile(self, *args, **kwargs):
        monkeypatch.setattr(Engine, "stream", stream)
        told.append(error_of(capsys, source, target, "--resume"))
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "stream", meanwhile)
    assert len(run(source, target)) == 2
    assert "which another run is writing" in told[0]


def test_a_pipe_gets_lines_in_the_inputs_order_or_as_they_finish(tmp_path, quick, capsys):
    source = write(tmp_path / "in.jsonl", prompts(9))

    def ids(*args):
        assert cli.main([*call(source, "-"), *args]) == 0
        return [json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()]

    assert ids() == list(range(9))
    finished = ids("--output-order", "finished")
    assert sorted(finished) == list(range(9))
    assert finished != list(range(9))


BAD = ['{"prompt": ', '{"prompt_token_ids": [999]}', '{"prompt": "a", "top_p": 2}', '{"messages": [{"role": "user", "content": "a"}]}']  # fmt: skip


def test_bad_lines_are_told_and_left_out_and_the_others_draw_as_they_did(tmp_path, quick, capsys):
    good = [json.dumps(record) for record in prompts(4)]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join([good[0], *BAD[:2], good[1], *BAD[2:], good[3]]))
    assert error_of(capsys, source, target).startswith(f"{source} line 2 is not JSON")
    assert not target.exists()
    got = run(source, target, "--on-error", "skip")
    assert [record["id"] for record in got] == [0, 1, 3]
    assert [record["resume_key"].split("-")[0] for record in got] == ["0", "3", "6"]
    told = capsys.readouterr().err.splitlines()
    numbers = (2, 3, 5, 6)
    assert [line.startswith(f"epmoe-generate: skipped: {source} line {n}") for line, n in zip(told, numbers, strict=False)] == [True] * 4  # fmt: skip
    assert told[4] == "epmoe-generate: skipped 4 of 7 lines"
    before = target.read_bytes()
    run(source, target, "--on-error", "skip", "--resume")
    assert target.read_bytes() == before
    source.write_text("\n".join(BAD))
    told = cli.main(call(source, tmp_path / "none.jsonl", "--on-error", "skip")), capsys.readouterr().err
    assert told[0] == 2
    assert told[1].splitlines()[-1] == "epmoe-generate: error: no line is left to continue; --on-error skip left all of them out"  # fmt: skip


def batch_line(custom_id="a", url="/v1/completions", method="POST", **body):
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def test_openais_batch_lines_get_openais_responses(tmp_path, quick):
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    source = write(
        tmp_path / "in.jsonl",
        [
            batch_line(
                "chat",
                "/v1/chat/completions",
                messages=chat,
                max_completion_tokens=3,
                model="m",
                n=1,
                logprobs=True,
                top_logprobs=2,
            ),
            batch_line(
                "text", prompt="hi", max_tokens=2, temperature=0, top_p=None, logit_bias={}, stream=False, logprobs=1
            ),
            batch_line("ids", prompt=[1, 2, 3], seed=7, temperature=1.0, user="u", ignore_eos=True),
            {"prompt": "plain", "id": 3, "logprobs": 0},
        ],
    )
    target = tmp_path / "out.jsonl"
    chat, text, ids, plain = run(source, target, tokenizer=True)
    assert [list(line) for line in (chat, text, ids)] == [["id", "custom_id", "response", "error"]] * 3
    assert [(line["custom_id"], line["error"], line["response"]["status_code"]) for line in (chat, text, ids)] == [
        ("chat", None, 200), ("text", None, 200), ("ids", None, 200)
    ]  # fmt: skip
    body = chat["response"]["body"]
    (choice,) = body["choices"]
    assert (body["object"], body["model"], choice["finish_reason"]) == ("chat.completion", "m", "length")
    assert choice["message"]["role"] == "assistant"
    assert isinstance(choice["message"]["content"], str)
    told = choice["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in told] == [2] * 3
    for token in told:  # greedy: each is the likeliest
        assert token["top_logprobs"][0] == {key: token[key] for key in ("token", "logprob", "bytes")}
        assert bytes(token["bytes"]).decode() == token["token"]
        assert token["logprob"] > token["top_logprobs"][1]["logprob"]
    assert body["usage"]["completion_tokens"] == 3
    assert body["usage"]["total_tokens"] == body["usage"]["prompt_tokens"] + 3
    body = text["response"]["body"]
    assert (body["object"], body["model"], body["usage"]["completion_tokens"]) == ("text_completion", "mixtral", 2)
    assert isinstance(body["choices"][0]["text"], str)
    told = body["choices"][0]["logprobs"]
    assert [len(told[key]) for key in ("tokens", "token_logprobs", "top_logprobs")] == [2, 2, 2]
    assert told["top_logprobs"] == [{t: p} for t, p in zip(told["tokens"], told["token_logprobs"], strict=True)]
    assert ids["response"]["body"]["choices"][0]["logprobs"] is None
    assert ids["response"]["body"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert plain["id"] == 3
    assert [list(map(int, token)) for token in plain["logprobs"]] == [[token] for token in plain["token_ids"]]
    lines = target.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[::2]))
    run(source, target, "--resume", tokenizer=True)
    resumed = target.read_text().splitlines(keepends=True)
    assert resumed[::2] == lines[::2]
    without_time = [
        [{**json.loads(line)["response"]["body"], "created": 0} for line in of[1:2]] for of in (lines, resumed)
    ]
    assert without_time[0] == without_time[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (batch_line(3, prompt="a"), "custom_id is 3; it should be a string, not empty"),
        (batch_line(method="GET", prompt="a"), "method is 'GET'; it should be POST"),
        (batch_line(url="/v1/embeddings", prompt="a"), "url is '/v1/embeddings'; it should be /v1/chat/completions or"),
        ({**batch_line(), "body": []}, "body is '[]'; it should be an object"),
        (batch_line(messages=[]), "prompt is None; it should be a string"),
        (batch_line(prompt=["a", "b"]), "prompt is ['a', 'b']; it should be a string"),
        (batch_line(prompt="a", n=2), "n is 2; it is not served and should be left out"),
        (batch_line(prompt="a", frequency_penalty=0.5), "frequency_penalty is 0.5; it is not served"),
        (batch_line(prompt="a", temperature=-1), "temperature is -1; it should be 0 (greedy) or a positive number"),
        (batch_line(url="/v1/chat/completions", messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
         "messages 1 is \"[{'type': 'image_url'}]\"; it should be a string or parts of type text"),
    ],
)  # fmt: skip
def test_a_bad_batch_line_is_named(tmp_path, line, message, capsys, quick):
    source = write(tmp_path / "in.jsonl", [line])
    assert error_of(capsys, source, tmp_path / "out", tokenizer=True).startswith(f"{source} line 1: {message}")


def test_a_custom_id_is_used_once(tmp_path, capsys, quick):
    source = write(tmp_path / "in.jsonl", [batch_line(prompt="a"), batch_line(prompt="b")])
    told = error_of(capsys, source, tmp_path / "out.jsonl", tokenizer=True)
    assert told == f"{source} line 2: custom_id is 'a', as of {source} line 1; it should be the line's own"


def test_an_entry_of_a_batch_keeps_what_vllm_and_sglang_call_sampling(tmp_path):
    line = batch_line(prompt="a", max_tokens=3, top_k=5, stop_token_ids=[1], ignore_eos=True, seed=None)
    (entry,) = read_entries(str(write(tmp_path / "in.jsonl", [line])))
    assert entry.sampling == {"max_new_tokens": 3, "top_k": 5, "stop_token_ids": [1], "ignore_eos": True}
    assert entry.extra == {}


@pytest.mark.slow
def test_a_profile_and_the_rows_of_experts_are_written(tmp_path):
    config = {
        "model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 64, "num_experts": 8,
        "num_experts_per_tok": 2, "num_hidden_layers": 2, "mlp_only_layers": [0], "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 128, "max_position_embeddings": 256,
    }  # fmt: skip
    model = tmp_path / "tiny"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    source = write(tmp_path / "in.jsonl", [{"prompt_token_ids": [1, 2, 3, 4]}, {"prompt_token_ids": [5, 6]}])
    command = [
        sys.executable,
        "-m",
        "jax_epmoe.generate",
        "--model",
        model,
        "--load-format",
        "dummy",
        "--input",
        source,
    ]
    command += ["--output", tmp_path / "out.jsonl", "--max-new-tokens", "5", "--ignore-eos"]
    command += ["--expert-load", tmp_path / "load.npz", "--profile", tmp_path / "trace"]
    subprocess.run([*map(str, command)], check=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})
    recorded = read_expert_load(tmp_path / "load.npz")
    assert (recorded.model, recorded.layers.tolist(), recorded.top_k) == ("tiny", [1], 2)
    # Each prompt's tokens, and all new ones but the last.
    assert recorded.rows.sum() == (4 + 2 + 2 * (5 - 1)) * 2
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_completions_are_shown_below_their_prompts_as_they_come(monkeypatch, capsys):
    class Backwards:
        stats = type("Stats", (), {"summary": lambda self: "summary"})()

        def stream(self, prompts, sampling, progress, indices):
            for i in reversed(range(len(prompts))):
                yield i, Completion([70 + i], "length", 1)

    monkeypatch.setattr(cli, "_make_engine", lambda *args: Backwards())
    call = ["--model", str(MODEL), "--prompt-token-ids", "1,2", "--prompt-token-ids", "3"]
    assert cli.main(call) == 0
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("=== --prompt-token-ids 1 ===\n1,2\n--- completion (length) ---\n")
    assert second.startswith("=== --prompt-token-ids 2 ===\n3\n--- completion (length) ---\n")
