"""Generation: one run for one snapshot: decide, plan, test, render, assemble, judge, publish.

May import: `training`, `evaluation`, `prior`, `decoder`, `data`, `catalog`, and what they may.
Must not hold: mathematics, or the published format.
"""
