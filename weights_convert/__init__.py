"""Hugging Face checkpoints -> ours, and back; the only place that knows Hugging Face's tensor names."""

from weights_convert.convert import Summary as Summary
from weights_convert.convert import convert as convert
from weights_convert.to_hf import to_hf as to_hf
from weights_convert.verify import Verified as Verified
from weights_convert.verify import verify as verify
