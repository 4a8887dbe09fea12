"""From where on the products of the context stage are worth packing into AMX tiles."""

LEAST_SIDE = 64
"""Rows and depth of a product; fewer leave tiles half empty."""

LEAST_PRODUCT = 1 << 22
"""Multiply-adds; below, packing costs more than the tiles save."""
