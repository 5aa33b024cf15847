"""Scores on tasks of the lm-evaluation-harness."""
