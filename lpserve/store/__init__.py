"""Durable files: the score store, its lock and lease, score tables, run folders."""
