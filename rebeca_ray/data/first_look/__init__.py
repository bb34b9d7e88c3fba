"""A first look at people's data: the facts, the guesses, and tables in the form that the jobs read.

May import: `data`, `schemas`, `storage`, and their imports.
Must not hold: settings of the jobs, a model, or Ray: a first look takes minutes on one machine.
"""
