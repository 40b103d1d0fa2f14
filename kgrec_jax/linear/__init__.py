"""Closed forms: fitted in seconds without a training loop; baselines and parts of the fused score at once."""
