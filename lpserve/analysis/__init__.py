"""From scores to answers: surrogate, values, plan, and how sure they are."""
