"""What a checkpoint folder says of a model: files, architecture, players, sizes. Loads no torch."""
