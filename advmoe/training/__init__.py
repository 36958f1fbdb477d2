"""Training: what is minimised, who is updated when, and the loop that survives an interruption."""
