"""Commands that die, storage that fails, files that are damaged, and two commands at once.

Every fault has a seed. Each command has an undisturbed twin with the same beginning.
"""
