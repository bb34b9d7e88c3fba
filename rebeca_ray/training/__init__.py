"""Training: interactions and embedded items -> a prior directory, by Ray Train; then calibrated, and distilled where asked.

May import: `prior`, `data`, `evaluation`, and what they may.
Must not hold: the decoder, or anything about a night.
"""
