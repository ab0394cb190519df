"""Expert-parallel Mixture-of-Experts for JAX on NVIDIA Hopper GPUs. See README.md."""

from jax_epmoe.checkpoint import dummy_model as dummy_model
from jax_epmoe.checkpoint import load_model as load_model
from jax_epmoe.config import MoEConfig as MoEConfig
from jax_epmoe.generate.llm import LLM as LLM
from jax_epmoe.generate.sampling import SamplingParams as SamplingParams
from jax_epmoe.kernels.grouped_gemm import grouped_gemm as grouped_gemm
from jax_epmoe.mesh import initialize_distributed as initialize_distributed
from jax_epmoe.mesh import make_mesh as make_mesh
from jax_epmoe.moe.layer import EPMoE as EPMoE
