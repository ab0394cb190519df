import io
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jax_epmoe.generate import Engine, cli
from jax_epmoe.generate.inputs import read_entries
from weights_convert import convert

CHECKPOINTS = Path(__file__).parents[1] / "parity" / "checkpoints"


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """A converted checkpoint whose greedy texts are known, in a folder."""
    folder = tmp_path_factory.mktemp("converted") / "mixtral"
    convert(CHECKPOINTS / "mixtral", folder, dtype="float32")
    return folder


@pytest.fixture(scope="module")
def expected():
    return np.load(CHECKPOINTS / "mixtral" / "expected.npz", allow_pickle=False)


@pytest.fixture
def no_tokenizer(tmp_path):
    folder = tmp_path / "ids-only"
    folder.mkdir()
    shutil.copy(CHECKPOINTS / "mixtral" / "config.json", folder)
    return folder


@pytest.fixture
def quick(monkeypatch, hash_model):
    """The CLI with a model that needs no weights; returns the engines that were made."""
    engines = []

    def make(args, folder, eos_token_ids, show_progress, tokenizer, recorder):
        engines.append(Engine(hash_model(vocab=269), eos_token_ids=eos_token_ids))
        return engines[-1]

    monkeypatch.setattr(cli, "_make_engine", make)
    return engines


def records(text):
    return [json.loads(line) for line in text.splitlines()]


def refused(capsys, *args):
    """The one line that a refused call says."""
    assert cli.main([*map(str, args)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("epmoe-generate: error: ")
    return err.removeprefix("epmoe-generate: error: ").rstrip()


@pytest.mark.parametrize(
    "mesh",
    [
        ("--tp-size", "4", "--ep-size", "2", "--dp-size", "2"),
        ("--tp-size", "4", "--ep-size", "4", "--enable-dp-attention"),
    ],
    ids=["hybrid", "dp_attention"],
)
def test_a_converted_checkpoint_says_on_a_mesh_what_transformers_says(mesh, mixtral, expected, tmp_path, capsys):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(
        "".join(json.dumps({"prompt": str(p), "id": i}) + "\n" for i, p in enumerate(expected["prompt_text"]))
    )
    args = [*mesh, "--prefill-chunk", "16", "--max-new-tokens", "12"]
    files = ["--input", str(source), "--output", str(target)]
    assert cli.main(["--model", str(mixtral), *files, *args, "--ignore-eos"]) == 0
    got = records(target.read_text())
    assert [r["token_ids"] for r in got] == expected["greedy"].tolist()
    assert [r["text"] for r in got] == [str(text) for text in expected["greedy_text"]]
    assert [(r["id"], r["finish_reason"]) for r in got] == [(i, "length") for i in range(len(got))]
    out, err = capsys.readouterr()
    assert out == ""
    for word in ("prompts", "output", "first token", "compilation", "memory"):
        assert word in err


def test_random_weights_and_token_ids_need_neither_checkpoint_nor_tokenizer(no_tokenizer, capsys):
    args = ["--model", no_tokenizer, "--load-format", "dummy", "--prompt-token-ids", "1,2,3", "--max-new-tokens", "2"]
    assert cli.main([*map(str, args), "--output", "-", "--temperature", "0.5", "--tp-size", "2"]) == 0
    (record,) = records(capsys.readouterr().out)
    assert record["text"] is None
    assert len(record["token_ids"]) == 2


def test_a_program_without_a_terminal_writes_only_the_text(mixtral, capsys, quick):
    assert cli.main(["--model", str(mixtral), "--prompt", "Mixture", "--max-new-tokens", "3"]) == 0
    alone, err = capsys.readouterr()
    assert alone.count("\n") == 1
    assert "\r" not in err
    assert cli.main(["--model", str(mixtral), "--prompt", "Mixture", "--prompt", "a", "--max-new-tokens", "3"]) == 0
    both = capsys.readouterr().out
    assert both.startswith(
        f"=== --prompt 1 ===\nMixture\n--- completion (length) ---\n{alone}\n=== --prompt 2 ===\na\n"
    )


def test_standard_input_is_jsonl_or_text_by_its_first_character(mixtral, monkeypatch, capsys, quick):
    def generate(text):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        assert cli.main(["--model", str(mixtral), "--input", "-", "--output", "-", "--max-new-tokens", "4"]) == 0
        return records(capsys.readouterr().out)

    from_text = generate("a\r\n\n Mixture {\n")
    from_json = generate('\ufeff{"prompt": "a"}\n\n{"prompt": " Mixture {"}')
    assert len(from_text) == 2
    assert from_json == from_text


def test_a_line_sets_its_own_sampling_and_its_other_keys_are_carried_through(mixtral, tmp_path, capsys, quick):
    source = tmp_path / "in.jsonl"
    source.write_text(
        '{"prompt": "a", "max_new_tokens": 2, "id": [1], "text": "old", "w": null}\n'
        '{"prompt_token_ids": [1, 67], "temperature": 2.0, "seed": 3}\n{"prompt": "a"}\n'
    )
    assert cli.main(["--model", str(mixtral), "--input", str(source), "--output", "-", "--max-new-tokens", "6"]) == 0
    first, second, third = records(capsys.readouterr().out)
    assert list(first) == ["id", "text", "w", "token_ids", "finish_reason", "resume_key"]
    assert (first["id"], first["w"], len(first["token_ids"])) == ([1], None, 2)
    assert first["text"] != "old"
    assert first["token_ids"] == third["token_ids"][:2]
    assert len(second["token_ids"]) == 6
    assert second["token_ids"] != third["token_ids"]


def test_stop_tokens_of_both_configs_and_the_command_line_end_a_text(mixtral, tmp_path, capsys, quick):
    folder = tmp_path / "model"
    shutil.copytree(mixtral, folder)
    call = ["--model", str(folder), "--prompt", "a", "--output", "-", "--max-new-tokens", "6"]
    assert cli.main([*call, "--ignore-eos"]) == 0
    ids = records(capsys.readouterr().out)[0]["token_ids"]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [ids[3], 260]}))
    assert cli.main(call) == 0
    assert quick[-1].eos_token_ids == (2, ids[3], 260)
    assert records(capsys.readouterr().out)[0]["token_ids"] == ids[:4]
    assert cli.main([*call, "--ignore-eos", "--stop-token-ids", f"1,{ids[4]}"]) == 0
    (record,) = records(capsys.readouterr().out)
    assert (record["token_ids"], record["finish_reason"]) == (ids[:5], "stop")
    from transformers import AutoTokenizer

    assert record["text"] == AutoTokenizer.from_pretrained(folder).decode(ids[:4], skip_special_tokens=True)


def test_a_chat_is_written_by_the_template_with_one_bos(mixtral, expected, tmp_path, monkeypatch, capsys, quick):
    seen = []
    stream = Engine.stream
    monkeypatch.setattr(
        Engine, "stream", lambda self, prompts, *a, **k: seen.extend(prompts) or stream(self, prompts, *a, **k)
    )
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"messages": json.loads(str(expected["chat_messages"]))}) + '\n{"prompt": "hi"}\n')
    call = ["--model", str(mixtral), "--input", str(source), "--output", "-", "--max-new-tokens", "1", "--chat"]
    assert cli.main(call) == 0
    assert seen[0] == expected["chat_ids"].tolist()
    assert [ids.count(1) for ids in seen] == [1, 1]
    assert "messages" not in records(capsys.readouterr().out)[0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("", " is 'empty'; it should be a prompt a line, or a JSON object a line"),
        ('{"prompt": "a"}\n{"prompt": ', " line 2 is not JSON: "),
        ('\n[1]\n', " line 2 is '[1]'; it should be a JSON object with one of prompt, prompt_token_ids, messages"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', " line 1 is "),
        ('{"prompt": 3}', " line 1: prompt is 3; it should be a string"),
        ('{"prompt": "\\ud800"}', " line 1: prompt is "),
        ('{"prompt_token_ids": [1, "2"]}', " line 1: prompt_token_ids is \"[1, '2']\"; it should be a list of token ids"),
        ('{"prompt_token_ids": []}', " line 1: number of tokens is 0; it should be at least 1"),
        ('{"prompt_token_ids": [1, 269]}', " line 1: token id is 269; it should be an integer from 0 to 268"),
        (json.dumps({"prompt_token_ids": [1] * 512}), " line 1: number of tokens is 512; it should be at most 511"),
        ('{"prompt": "a", "top_p": 2}', " line 1: top_p is 2; it should be more than 0 and at most 1"),
        ('{"prompt": "a", "temperature": "hot"}', " line 1: temperature is 'hot'"),
        ('{"messages": [{"role": "user", "content": "a"}]}', " line 1 holds messages; it should be a prompt, or --chat given"),
        ('{"messages": [{"content": "a"}]}', " line 1: messages 1 is "),
    ],
)  # fmt: skip
def test_a_bad_line_is_named_and_nothing_is_written(mixtral, tmp_path, capsys, lines, message):
    source, target = tmp_path / "in.jsonl", tmp_path / "out" / "out.jsonl"
    target.parent.mkdir()
    source.write_text(lines)
    told = refused(capsys, "--model", mixtral, "--input", source, "--output", target)
    assert told.startswith(f"{source}{message}")
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "there is nothing to continue; --prompt, --prompt-token-ids or --input should be given"),
        (["--prompt", "a", "--top-p", "0"], "top_p is 0.0; it should be more than 0 and at most 1"),
        (["--prompt", "a", "--temperature", "-1"], "temperature is -1.0; it should be 0 (greedy) or a positive number"),
        (["--prompt", "a", "--top-k", "x"], "argument --top-k: invalid int value: 'x'"),
        (["--prompt", "a", "--seed", "-1"], "seed is -1; it should be an integer from 0 to 2**32 - 1"),
        (["--prompt", "a", "--max-new-tokens", "0"], "max_new_tokens is 0; it should be a positive integer"),
        (["--prompt", "a", "--stop-token-ids", "1;2"], "argument --stop-token-ids: '1;2' should be token ids"),
        (["--prompt", "a", "--max-batch-size", "0"], "max_batch_size is 0; it should be a positive integer"),
        (["--prompt", "a", "--prefill-chunk", "-1"], "prefill_chunk is -1; it should be a positive integer"),
        (["--prompt", "a", "--context-length", "513"], "context_length is 513; it should be from 2 to the model's 512"),
        (["--prompt", "a", "--context-length", "2"], "--prompt 1: number of tokens is 2; it should be at most 1"),
        (["--prompt", "a", "--tp-size", "0"], "tp_size is 0; it should be a positive integer"),
        (
            ["--prompt", "a", "--tp-size", "4", "--dp-size", "2", "--enable-dp-attention"],
            "--dp-size is 2; it should be 4, as tp_size, or left out with --enable-dp-attention",
        ),
        (["--prompt", "a", "--tp-size", "16"], "tp_size * dp_size is 16; it should be at most the 8 devices"),
        (["--prompt", "a", "--tp-size", "3"], "tp_size is 3; it should be a divisor of the 8 query heads"),
        (["--prompt", "a", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--prompt", "a", "--kv-cache-dtype", "int8"], "argument --kv-cache-dtype: invalid choice: 'int8'"),
        (["--prompt", "a", "--process-id", "0"], "coordinator_address, num_processes, process_id is "),
        (["--prompt", "a", "--what"], "unrecognized arguments: --what"),
        (["--input", "/nowhere/in.jsonl"], "/nowhere/in.jsonl: No such file or directory"),
        (["--input", "/"], "/: Is a directory"),
        (["--prompt", "a", "--output", "/nowhere/out.jsonl"], "/nowhere/"),
        (["--prompt", ""], "--prompt 1 is ''; it should be some text"),
        (["--prompt", "a", "--resume"], "--resume needs a file as --output; it should be the one to go on with"),
        (["--prompt", "a", "--resume", "--output", "-"], "--resume needs a file as --output"),
        (["--prompt", "a", "--profile-seconds", "0"], "--profile-seconds is 0.0; it should be a positive number"),
        (["--prompt", "a", "--expert-load", "/nowhere/load.npz"], "/nowhere/load.npz: No such file"),
    ],
)
def test_a_bad_argument_is_one_line(mixtral, capsys, args, message, quick, request):
    if "--tp-size" in args:
        request.getfixturevalue("monkeypatch").undo()
    assert refused(capsys, "--model", mixtral, *args).startswith(message)


def test_a_folder_that_is_no_model_is_one_line(tmp_path, no_tokenizer, mixtral, capsys):
    prompt = ("--prompt-token-ids", "1")
    assert refused(capsys, *prompt) == "the following arguments are required: --model"
    assert "it should be a folder with a config.json" in refused(capsys, "--model", tmp_path / "none", *prompt)
    assert "epmoe.json" in refused(capsys, "--model", no_tokenizer, *prompt)
    assert "has no tokenizer" in refused(capsys, "--model", no_tokenizer, "--prompt", "a")
    assert refused(capsys, "--model", no_tokenizer, *prompt, "--chat").startswith("--chat needs a tokenizer")
    broken = tmp_path / "broken"
    shutil.copytree(mixtral, broken)
    (broken / "tokenizer.json").write_text("{")
    assert "the tokenizer in" in refused(capsys, "--model", broken, *prompt)
    (broken / "generation_config.json").write_text("[")
    assert "generation_config.json is not a JSON object" in refused(capsys, "--model", broken, *prompt)
    (broken / "config.json").write_text("{}")
    assert "model_type is None" in refused(capsys, "--model", broken, *prompt)


def test_a_file_that_is_no_text_is_one_line(mixtral, tmp_path, capsys):
    (tmp_path / "in.txt").write_bytes(b"ok\n\xff\n")
    told = refused(capsys, "--model", mixtral, "--input", tmp_path / "in.txt")
    assert told.endswith("in.txt is not UTF-8 text: invalid start byte at byte 3")


def test_a_tokenizer_without_a_template_or_a_template_that_refuses_is_one_line(mixtral, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(mixtral, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "chat_template": "{{ raise_exception('no system\nrole') }}"}))
    call = ("--model", folder, "--prompt", "a", "--chat")
    assert refused(capsys, *call) == "--prompt 1: the chat template refuses the messages: no system role"
    del config["chat_template"]
    path.write_text(json.dumps(config))
    assert refused(capsys, *call).startswith("--chat needs a tokenizer with a chat template")


def test_a_defect_keeps_its_traceback_and_leaves_no_file(mixtral, tmp_path, monkeypatch, quick):
    monkeypatch.setattr(Engine, "stream", lambda *args, **kwargs: json.loads("{"))
    with pytest.raises(ValueError, match="Expecting property name"):
        cli.main(["--model", str(mixtral), "--prompt", "a", "--output", str(tmp_path / "out.jsonl")])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_is_told_and_leaves_no_file(mixtral, tmp_path, monkeypatch, capsys, quick):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "stream", interrupt)
    assert cli.main(["--model", str(mixtral), "--prompt", "a", "--output", str(tmp_path / "out.jsonl")]) == 130
    assert capsys.readouterr().err == "\nepmoe-generate: interrupted\n"
    assert list(tmp_path.iterdir()) == []


def test_only_the_first_process_writes(mixtral, tmp_path, monkeypatch, capsys, quick):
    monkeypatch.setattr("jax.process_index", lambda *args: 1)
    args = ["--model", str(mixtral), "--prompt", "a", "--max-new-tokens", "2"]
    monkeypatch.setattr(Engine, "stream", lambda *args, **kwargs: [])
    assert cli.main([*args, "--output", str(tmp_path / "out.jsonl")]) == 0
    assert cli.main(args) == 0
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == []


def test_text_files_hold_a_prompt_a_line_whatever_they_begin_with(tmp_path):
    (tmp_path / "in.txt").write_text('{"prompt": "a"}\nb\u2028c\n')
    entries = read_entries(str(tmp_path / "in.txt"))
    assert [(e.content, e.name) for e in entries] == [
        ('{"prompt": "a"}', f"{tmp_path}/in.txt line 1"),
        ("b\u2028c", f"{tmp_path}/in.txt line 2"),
    ]


def test_a_closed_pipe_is_no_traceback(mixtral):
    program = f"""
import sys
from jax_epmoe.generate import Completion, Engine, cli
from jax_epmoe.generate.stats import Stats
class Quick:
    stats = Stats()
    def stream(self, prompts, sampling, progress, indices): return [(0, Completion([67] * 100000, "length", 1))]
cli._make_engine = lambda *args: Quick()
sys.exit(cli.main(["--model", {str(mixtral)!r}, "--prompt", "a", "--output", "-"]))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_help_names_every_flag_of_sampling(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    for flag in ("--model", "--ep-size", "--input", "--top-p", "--ignore-eos", "--coordinator-address"):
        assert flag in out


@pytest.mark.slow
def test_two_processes_write_one_file_with_what_one_process_says(mixtral, expected, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps({"prompt": str(p)}) + "\n" for p in expected["prompt_text"]))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    call = [sys.executable, "-m", "jax_epmoe.generate", "--model", mixtral, "--input", source, "--output", target]
    call += [
        "--tp-size",
        "4",
        "--ep-size",
        "2",
        "--dp-size",
        "2",
        "--max-new-tokens",
        "12",
        "--ignore-eos",
        "--num-processes",
        "2",
    ]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    processes = [
        subprocess.Popen([*call, "--coordinator-address", address, "--process-id", str(i)], env=environment)
        for i in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [r["token_ids"] for r in records(target.read_text())] == expected["greedy"].tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
