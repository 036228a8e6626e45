"""Sets and checkpoints measured: perplexity, tasks, speed."""
