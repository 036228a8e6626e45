"""Durable files: the score store, its lock and lease, tables, run folders."""
