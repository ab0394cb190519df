"""The throughput benchmark: its requests, its figures by hand, and the program on the CPU with a tiny model."""

import json
import sys
from types import SimpleNamespace

import pytest

from bench import device_busy, offline_throughput, scopes, transformers_peer
from bench.requests import Request, measured, random_requests, shared_prefix_requests, sharegpt_requests

TINY = {
    "model_type": "qwen3_moe", "hidden_size": 32, "moe_intermediate_size": 16, "intermediate_size": 64, "num_experts": 8,
    "num_experts_per_tok": 2, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "vocab_size": 128, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(TINY))
    return path


def program(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.offline_throughput", *map(str, arguments)])
    return offline_throughput.main()


def test_random_requests_have_lengths_in_the_range_and_come_again():
    requests = random_requests(200, 40, 10, 0.5, 99, seed=1)
    assert {len(r.prompt) for r in requests} == set(range(20, 41))
    assert {r.output_len for r in requests} == set(range(5, 11))
    assert all(0 <= token < 99 for r in requests for token in r.prompt)
    assert requests == random_requests(200, 40, 10, 0.5, 99, seed=1)
    assert requests != random_requests(200, 40, 10, 0.5, 99, seed=2)
    assert {(len(r.prompt), r.output_len) for r in random_requests(9, 40, 10, 1, 99, seed=1)} == {(40, 10)}
    assert min(len(r.prompt) for r in random_requests(200, 4, 4, 0, 99, seed=1)) == 1
    with pytest.raises(ValueError, match="--random-range-ratio is 2; it should be from 0 to 1"):
        random_requests(1, 1, 1, 2, 9, seed=0)


def test_groups_share_their_system_prompt_and_nothing_else():
    requests = shared_prefix_requests(3, 4, 20, 5, 7, 1000, seed=0)
    assert [(len(r.prompt), r.output_len) for r in requests] == [(25, 7)] * 12
    systems = [tuple(r.prompt[:20]) for r in requests]
    assert sorted(systems.count(system) for system in set(systems)) == [4, 4, 4]
    assert systems != sorted(systems)
    assert len({tuple(r.prompt[20:]) for r in requests}) == 12


def test_first_turns_that_fit_come_from_a_sharegpt_file(tmp_path):
    def tokenizer(text):
        return {"input_ids": [len(word) for word in text.split()]}

    def turn(prompt, answer):
        return {
            "conversations": [{"from": "human", "value": "w " * prompt}, {"value": "a " * answer}, {"value": "more"}]
        }

    path = tmp_path / "sharegpt.json"
    path.write_text(json.dumps([turn(5, 6), turn(3, 9), turn(9, 3), turn(30, 30), {"conversations": []}, turn(8, 9)]))
    requests = sharegpt_requests(path, 10, tokenizer, 40, None, seed=0)
    assert sorted((len(r.prompt), r.output_len) for r in requests) == [(5, 6), (8, 9)]
    assert len(sharegpt_requests(path, 1, tokenizer, 40, None, seed=0)) == 1
    fixed = sharegpt_requests(path, 10, tokenizer, 40, 7, seed=0)
    assert sorted((len(r.prompt), r.output_len) for r in fixed) == [(5, 7), (8, 7), (9, 7), (30, 7)]
    with pytest.raises(ValueError, match="has no first turn that fits the context of 9"):
        sharegpt_requests(path, 10, tokenizer, 9, None, seed=0)
    path.write_text('{"a": 1}')
    with pytest.raises(ValueError, match="is no ShareGPT file"):
        sharegpt_requests(path, 10, tokenizer, 40, None, seed=0)


def test_figures_by_hand():
    figures = measured("x", [Request([1] * 30, 5), Request([1] * 10, 5)], 8, 4.0)
    assert figures == {
        "backend": "x", "successful_requests": 2, "total_latency": 4.0, "total_input_tokens": 40, "total_output_tokens": 8,
        "request_throughput": 0.5, "input_throughput": 10.0, "output_throughput": 2.0, "total_throughput": 12.0,
    }  # fmt: skip


def test_moments_count_once():
    assert device_busy.covered([(5, 6), (0, 2), (1, 3), (1, 1.5)]) == 4
    kernels = [("prefill", (0, 40)), ("decode", (30, 60)), ("decode", (80, 100)), ("other", (98, 99))]
    assert device_busy._shares(kernels) == {
        "seconds": 1e-7, "busy": 0.8, "idle": pytest.approx(0.2), "prefill": 0.4, "decode": 0.5, "other": 0.01
    }  # fmt: skip


def test_a_gpus_streams_count_and_their_sums_do_not():
    def event(start, length, **stats):
        return SimpleNamespace(start_ns=start, duration_ns=length, stats=list(stats.items()))

    def line(name, *events):
        return SimpleNamespace(name=name, events=events)

    plane = SimpleNamespace(
        name="/device:GPU:0",
        lines=[
            line(
                "Stream #13(Compute)",
                event(0, 10, hlo_module="jit__prefill"),
                event(20, 5, hlo_module="jit__decode(7)"),
            ),
            line("Stream #14(MemcpyD2H)", event(24, 6)),
            line("XLA Ops", event(0, 1000)),
        ],
    )
    profile = SimpleNamespace(planes=[SimpleNamespace(name="/host:CPU", lines=[]), plane])
    (of_gpu,) = scopes.streams(profile)
    assert [kernel for line in of_gpu for kernel in device_busy._kernels(line)] == [
        ("prefill", (0, 10)), ("decode", (20, 25)), ("other", (24, 30))
    ]  # fmt: skip


def test_a_peer_that_is_not_installed_is_told(folder, monkeypatch):
    monkeypatch.setattr(transformers_peer.sys, "executable", "false")
    answers = transformers_peer.ask(folder, [Request([1], 2)], dtype="float32", batch_size=1, seconds=20)
    failed = {"failed": "the process ended with status 1"}
    assert answers == {transformers_peer.STATIC: failed, transformers_peer.CONTINUOUS: failed}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "nothing"), "--model is 'nothing'; it should be a folder with a config.json, or one of"),
        (("--random-range-ratio", "-1"), "--random-range-ratio is -1.0; it should be from 0 to 1"),
        (("--dataset-name", "sharegpt"), "--dataset-name sharegpt needs --dataset-path; nothing is downloaded"),
        (("--num-prompts", "0"), "numbers and lengths are 0, 64, 16; they should be positive"),
        (("--context-length", "20", "--random-range-ratio", "1"), "the longest request has 80 tokens; it should fit"),
    ],
)
def test_a_bad_argument_is_one_line(monkeypatch, capsys, arguments, message):
    assert program(monkeypatch, *arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert message in err


@pytest.mark.slow
def test_a_run_is_measured_and_profiled(folder, tmp_path, monkeypatch, capsys):
    failed = {"failed": "no GPU"}
    output = {"backend": "b", **measured("b", [Request([1], 2)], 2, 1.0)}
    monkeypatch.setattr(transformers_peer, "ask", lambda *args, **kwargs: {"one": output, "two": failed})
    arguments = [
        "--model",
        folder,
        "--dtype",
        "float32",
        "--num-prompts",
        12,
        "--random-input-len",
        20,
        "--random-output-len",
        9,
    ]
    arguments += ["--max-running-requests", 4, "--peer", "transformers", "--result-filename", tmp_path / "all.jsonl"]
    for seed in (1, 2):
        assert program(monkeypatch, *arguments, "--seed", seed, "--output", tmp_path / "result.json") == 0
    result = json.loads((tmp_path / "result.json").read_text())
    lines = (tmp_path / "all.jsonl").read_text().splitlines()
    assert json.loads(lines[1]) == result
    requests = random_requests(12, 20, 9, 0.0, 128, seed=2)
    assert result["total_input_tokens"] == sum(len(r.prompt) for r in requests)
    assert result["total_output_tokens"] == sum(r.output_len for r in requests)
    phases, share = result["phases"], result["device_share"]
    assert phases["prefill_seconds"] + phases["decode_seconds"] <= result["total_latency"]
    assert 0 < phases["host_seconds"] <= phases["prefill_seconds"] + phases["decode_seconds"]
    assert phases["slots"] == 4
    assert 0 < share["busy"] <= 1
    assert share["busy"] + share["idle"] == pytest.approx(1)
    assert share["decode"] > 0
    out = capsys.readouterr().out
    assert "two                               no GPU" in out
    assert "devices busy" in out
