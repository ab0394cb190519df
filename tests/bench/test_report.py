"""The report on experts' rows: figures by hand, and the program."""

import sys

import numpy as np
import pytest

from bench import report
from jax_epmoe.generate.expert_load import ExpertLoad


@pytest.fixture
def recorder():
    """Layer 1: each expert busy in turn; layer 2: expert 3 gets three times its share."""
    recorder = ExpertLoad("tiny", layers=[1, 2], num_experts=4, top_k=2)
    recorder.add(np.array([[8, 0, 0, 0], [1, 1, 3, 3]]))
    recorder.add(np.array([[0, 8, 4, 4], [2, 2, 0, 12]]))
    return recorder


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.report", *map(str, arguments)])
    return report.main()


def test_imbalance_by_hand(recorder):
    rows = recorder.recorded().rows
    np.testing.assert_allclose(report.imbalance(rows.sum(axis=0)), [8 / 6, 15 / 6])
    np.testing.assert_allclose(report.stepwise_imbalance(rows), [16 / 6, 15 / 6])
    np.testing.assert_array_equal(report.of_ranks(rows, 2).sum(axis=0), [[16, 8], [6, 18]])
    assert report.imbalance(np.zeros((1, 4))).tolist() == [1.0]


def test_the_table_has_a_line_a_layer_with_its_figures(recorder, monkeypatch, tmp_path, capsys):
    recorder.save(tmp_path / "load.npz")
    assert run(monkeypatch, tmp_path / "load.npz", "--ep-size", "2") == 0
    head, columns, *lines = capsys.readouterr().out.splitlines()
    assert head.startswith("tiny: 12 tokens, top 2 of 4 experts in 2 layers, 2 windows, ")
    assert columns.split() == ["layer", "max", "/", "mean", "stepwise", "ep", "2", "stepwise", "busiest", "its", "share", "unused"]  # fmt: skip
    assert lines[0].split() == ["1", "1.33", "2.67", "1.33", "1.33", "0", "33.3%", "0"]
    assert lines[1].split() == ["2", "2.50", "2.50", "1.50", "1.50", "3", "62.5%", "0"]
    assert lines[2].split() == ["mean", "1.92", "2.58", "1.42", "1.42"]


def test_the_picture_is_drawn(recorder, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    recorder.save(tmp_path / "load.npz")
    assert run(monkeypatch, tmp_path / "load.npz") == 0
    assert (tmp_path / "load.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_no_recording_is_one_line(recorder, monkeypatch, tmp_path, capsys):
    recorder.save(tmp_path / "load.npz")
    ExpertLoad("m", [0], 4, 1).save(tmp_path / "empty.npz")
    for arguments, message in (
        ((tmp_path / "none",), "No such file"),
        ((tmp_path / "load.npz", "--ep-size", "3"), "--ep-size is 3; it should be a divisor of the 4 experts"),
        ((tmp_path / "empty.npz",), "holds no step"),
    ):
        assert run(monkeypatch, *arguments) == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert message in err
