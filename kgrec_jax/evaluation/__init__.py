"""What a run was worth: ranking, link prediction, significance, report, plots."""
