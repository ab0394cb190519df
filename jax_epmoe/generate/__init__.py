"""Offline generation on a device mesh: prompts in, text out. `epmoe-generate` is `cli.py`; `Engine` is its heart."""

from jax_epmoe.generate.engine import Engine as Engine
from jax_epmoe.generate.llm import LLM as LLM
from jax_epmoe.generate.llm import RequestOutput as RequestOutput
from jax_epmoe.generate.run import Completion as Completion
from jax_epmoe.generate.run import Update as Update
from jax_epmoe.generate.sampling import SamplingParams as SamplingParams
from jax_epmoe.generate.stats import Stats as Stats
