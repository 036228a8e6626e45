"""Published searches on the same engines, and what each found for its cost."""
