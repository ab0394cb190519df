"""The grouped products of torch's users, on the CPU: their operands and numbers, not their times."""

import sys

import numpy as np
import pytest

from bench import roofline, torch_products
from bench.roofline import DEEPGEMM, SCALED, SCALED_DENSE, SCALED_FAST, TORCH

torch = pytest.importorskip("torch")

import torch_stand_ins  # noqa: E402 (it needs torch)

SIZES = [[5, 0, 130, 1], [0, 130, 1, 5]]


@pytest.fixture
def results(monkeypatch):
    def measure(*peers, quantized):
        return torch_products.products_case(SIZES, 256, 128, 21, list(peers), quantized, device="cpu")

    monkeypatch.setattr(
        torch_products, "torch_times", lambda calls, iterations: {"device_us": 1.0, "calls": len(calls)}
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", torch_stand_ins.scaled_grouped_mm)
    monkeypatch.setitem(sys.modules, "deep_gemm", torch_stand_ins.deep_gemm())
    return measure


def test_bfloat16(results):
    found = results(TORCH, quantized=False)[TORCH]
    assert found["error"] < roofline.TOLERANCE
    assert found["calls"] == 2


@pytest.mark.parametrize("peer", [SCALED, SCALED_FAST, DEEPGEMM, SCALED_DENSE])
def test_float8(results, peer):
    found = results(peer, quantized=True)[peer]
    assert found["error"] < roofline.TOLERANCE, found
    assert found["calls"] == 2
    assert found["config"] == ("rows padded to 512" if peer == DEEPGEMM else "")


def test_a_product_with_other_scales_is_wrong(results, monkeypatch):
    def shifted(x, w, x_scales, w_scales, **options):
        return torch_stand_ins.scaled_grouped_mm(x, w, x_scales.roll(1), w_scales, **options)

    monkeypatch.setattr(torch, "_scaled_grouped_mm", shifted)
    assert results(SCALED, quantized=True)[SCALED]["error"] > 0.05


@pytest.mark.parametrize("tile", [(1, 128), (128, 128), (1, None), (None, None)], ids=str)
def test_quantised_tensors_stand_for_what_was_quantised(tile):
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 200, 300)).astype(np.float32))
    array = torch_products.quantize(x, *tile)
    rows, columns = -(-200 // (tile[0] or 200)), -(-300 // (tile[1] or 300))
    assert array.scales.shape == (3, rows, columns)
    assert float(array.values.float().abs().max()) == 448
    back = torch.stack([array[i] for i in range(3)])
    assert float((back - x).norm() / x.norm()) < 0.03
    one = torch_products.Quantized(array.values[1], array.scales[1], array.height, array.width)
    index = torch.tensor([199, 0, 130])
    assert torch.equal(one[index], back[1][index])
