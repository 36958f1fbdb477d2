"""Operations of routed networks: the only place that knows that there are kernels."""

from advmoe.ops.raw import kernels_used, without_kernels

__all__ = ["kernels_used", "without_kernels"]
