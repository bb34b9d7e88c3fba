"""Training: interactions and embedded items -> a prior directory, by Ray Train; calibration; distillation.

May import: `prior`, `data`, `evaluation`, and all that they may import.
Must not hold: the decoder, or anything about a run that generates.
"""
