"""The gallery: web pages over published snapshots, for people who look at them.

May import: everything that reads a catalog; Starlette and Jinja.
Must not hold: a computation that a run needs.
"""
