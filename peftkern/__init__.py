"""Fused linear layers with adapters over dense and 4-bit weights, forward and backward."""

from peftkern import nn, reference
from peftkern.dispatch import explain, use_backend
from peftkern.formats import DoubleQuant, QuantizedWeight
from peftkern.ops.linear import linear_4bit
from peftkern.ops.lora import lora_delta, lora_linear
from peftkern.ops.merge import merge, merge_error
from peftkern.ops.mora import mora, mora_delta, mora_linear, mora_rank
from peftkern.ops.quantize import dequantize_4bit, quantize_4bit

__version__ = "0.1.0"

__all__ = [
    "DoubleQuant",
    "QuantizedWeight",
    "__version__",
    "dequantize_4bit",
    "explain",
    "linear_4bit",
    "lora_delta",
    "lora_linear",
    "merge",
    "merge_error",
    "mora",
    "mora_delta",
    "mora_linear",
    "mora_rank",
    "nn",
    "quantize_4bit",
    "reference",
    "use_backend",
]
