"""Does it work: tests of generated items against users."""
