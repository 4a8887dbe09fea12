"""Room ias: budgets, success curves and allocations from quantiles of the success probability."""
