"""Pruned checkpoints: written, reloaded, compared."""
