"""Room dist_ppo: the clipped policy loss over the candidate tokens of every row, and its gradient."""
