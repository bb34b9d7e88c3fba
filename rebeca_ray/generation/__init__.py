"""Generation: one run for one snapshot: decide, plan, gate, render, assemble, gate again, publish.

May import: `training`, `evaluation`, `prior`, `decoder`, `data`, `catalog`, and what they may.
Must not hold: mathematics, or the published format.
"""
