"""The vLLM engine: its paths, its arguments, its life in this process."""
