"""The layer of torch's users, on the CPU: its numbers, not its times."""

import numpy as np
import pytest

from bench import layer_tables, torch_layer
from bench.layer_tables import SGLANG, TORCH_LAYER, TORCH_PEERS

torch = pytest.importorskip("torch")

from torch_stand_ins import scaled_grouped_mm  # noqa: E402 (it needs torch)


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize(("first_expert", "experts"), [(0, 16), (4, 4), (12, 4)])
def test_torchs_layer_is_right_on_every_rank(first_expert, experts, quantized, monkeypatch):
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_grouped_mm)  # the CPU has none
    monkeypatch.setattr(torch_layer, "torch_times", lambda calls, iterations: {"device_us": 1.0, "calls": len(calls)})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: function)
    rng = np.random.default_rng(0)
    ids = np.stack([rng.choice(16, 4, replace=False) for _ in range(37)])
    results = torch_layer.layer_case(
        64, 32, experts, 16, first_expert, ids.tolist(), 2, 21, list(TORCH_PEERS), quantized, device="cpu"
    )
    assert set(results) == set(TORCH_PEERS)
    assert results[TORCH_LAYER]["error"] < layer_tables.TOLERANCE
    assert results[TORCH_LAYER]["calls"] == 2
    assert results[SGLANG]["failed"]
