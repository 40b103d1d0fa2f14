"""What a run can do for a user: recommend and explain."""
