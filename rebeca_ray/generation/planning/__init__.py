"""Planning: the actor that samples users' embeddings, with all that it loads. Only it needs torch.

May import: `context`, `decisions` and `parts` of generation, and what they may.
Must not hold: a stage of a run.
"""
