"""Command line: `rebeca` and the jobs.

May import: everything.
Must not hold: logic; a command parses, calls the library, and prints the result.
"""
