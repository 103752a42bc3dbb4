"""Data-free quantisation: calibrated with synthetic images, simulated at any width, deployed as int8 on the CPU or as ONNX."""

from .load import load_quantized
from .model import accuracy
from .onnx_file import save_onnx
from .simulate import quantize

__all__ = ["accuracy", "load_quantized", "quantize", "save_onnx"]
