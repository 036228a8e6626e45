"""Which masks each round asks for, and when a run may end."""
