"""Command line: `rebeca` and the jobs: commands, what they print, how they end.

May import: everything.
Must not hold: logic; a command parses, calls the library, prints what it returns.
"""
