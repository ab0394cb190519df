"""Hugging Face checkpoints -> ours; the only place that knows Hugging Face's tensor names."""

from weights_convert.convert import Summary as Summary
from weights_convert.convert import convert as convert
