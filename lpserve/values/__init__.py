"""Shapley values, truncated semivalues and pairwise interactions of players, with their errors."""
