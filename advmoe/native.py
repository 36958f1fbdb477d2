"""The switch of the kernels for CPUs (`advmoe.ops`), under its public name."""

from advmoe.ops import without_kernels

__all__ = ["without_kernels"]
