"""Sparse training: which weights are zero at each step, and how that changes."""
