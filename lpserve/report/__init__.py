"""What a run leaves for people: files, pages, figures, logs."""
