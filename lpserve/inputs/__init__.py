"""What comes from outside: files and values that people give, read within limits and checked."""
