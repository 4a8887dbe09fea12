"""Kernel benchmarks: every op at fixed sizes, interleaved with what a user would run instead.

``prmfast bench`` runs them; ``pytest benchmarks --benchmark`` runs the same cases under pytest-benchmark. A case checks
its output against float64 before anything is timed, and a rival is timed only if it gives the same answer.
"""
