"""What masks are scored on: windows of texts, questions of tasks."""
