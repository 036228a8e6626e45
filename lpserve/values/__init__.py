"""Shapley values, interactions and their errors."""
