"""Studies: whole experiments over catalogs, their comparisons, figures and reports.

May import: `generation`, `training`, `evaluation`, and all that they may import.
Must not hold: a measure itself, or anything that a nightly run needs.
"""
