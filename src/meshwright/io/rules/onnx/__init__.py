"""Dim rules of ONNX's operators (https://onnx.ai/onnx/operators/), as `io.onnx` writes them into calls: settings are
attributes whatever the opset, constants of one number too, and operands have the names of opset 23."""

from __future__ import annotations

from meshwright.io.rules.onnx import attention, indexing, pointwise, products, reductions, views, windows  # noqa: F401
from meshwright.io.rules.onnx.pointwise import POINTWISE

__all__ = ["POINTWISE"]
