"""What runs inside vLLM's workers. Nothing else names vLLM's internals."""
