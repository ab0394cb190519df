"""For the CPU, what torch and DeepGEMM have for GPUs alone: float8 products that take what the kernels take, and refuse the rest."""

import types

import torch


def scaled_grouped_mm(x, w, x_scales, w_scales, *, offs, out_dtype, use_fast_accum):
    """`torch._scaled_grouped_mm` of `x [rows, k]` and `w [experts, k, n]`; torch itself checks dtypes, sizes and strides."""
    tensors = (_meta(each) for each in (x, w, x_scales, w_scales, offs))
    torch.ops.aten._scaled_grouped_mm.default(*tensors, None, None, out_dtype, use_fast_accum)
    out = torch.zeros(len(x), w.shape[2], dtype=out_dtype)
    start = 0
    for expert, end in enumerate(offs.tolist()):
        rows = x[start:end].float() * x_scales[start:end, None]
        out[start:end] = (rows @ (w[expert].float() * w_scales[expert])).to(out_dtype)
        start = end
    return out


def _meta(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def deep_gemm() -> types.ModuleType:
    """DeepGEMM's contiguous float8 product, with 1 x 128 and 128 x 128 scales; rows of a tile of 128 have one expert, or none."""

    def product(x, w, out, layout):
        (x, x_scales), (w, w_scales) = x, w
        (rows, k), (experts, n, _) = x.shape, w.shape
        assert x.dtype == w.dtype == torch.float8_e4m3fn
        assert (rows % 128, k % 128, n % 128) == (0, 0, 0)
        assert x_scales.shape == (rows, k // 128)
        assert w_scales.shape == (experts, n // 128, k // 128)
        assert out.shape == (rows, n)
        for tile in range(0, rows, 128):
            owners = set(layout[tile : tile + 128].tolist()) - {-1}
            assert len(owners) == 1, owners
            expert = owners.pop()
            scale = w_scales[expert].repeat_interleave(128, 0).repeat_interleave(128, 1)
            part = slice(tile, tile + 128)
            values = x[part].float() * x_scales[part].repeat_interleave(128, 1)
            out[part] = (values @ (w[expert].float() * scale).T).to(out.dtype)

    module = types.ModuleType("deep_gemm")
    module.m_grouped_fp8_gemm_nt_contiguous = product
    return module
