"""From where on the products of the context stage are worth packing into AMX tiles, and what the CUDA kernels take."""

LEAST_SIDE = 64
"""Rows and depth of a product; fewer leave tiles half empty."""

LEAST_PRODUCT = 1 << 22
"""Multiply-adds; below, packing costs more than the tiles save."""

CUDA_WIDEST, CUDA_DEEPEST = 64, 8
"""Width and number of hidden layers: value and tangent of a row stay in registers, all weights in shared memory."""

CUDA_HEAD_INPUTS, CUDA_HEAD_LEVELS = 512, 1024
"""Of the serving head: inputs of an affine head that its launch holds, and levels whose quantiles a block keeps."""
