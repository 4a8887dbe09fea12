"""Tensor-to-pointer adapters of the compiled CUDA backend, one module a room, with the reference's parameter names."""
