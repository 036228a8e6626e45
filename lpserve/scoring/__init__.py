"""Engines kept busy, and their results committed before they count."""
