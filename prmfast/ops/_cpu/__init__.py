"""Tensor-to-pointer adapters of the compiled CPU backend, one module a room, with the reference's parameter names."""
