"""Tensor operations in Triton, for CUDA. Nothing here is imported before `kernels.cuda.executor` is asked for CUDA."""
