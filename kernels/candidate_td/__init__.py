"""Room candidate_td: likely next tokens of every row and the advantage that a reward model gives each of them."""
