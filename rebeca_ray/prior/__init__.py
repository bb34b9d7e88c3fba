"""Prior: the mathematics that draws CLIP embeddings a user would like, and the directory a trained prior is kept in.

May import: `config`, `storage`, and what they may.
Must not hold: Ray, catalogs, images; everything here is a function of arrays and tensors, but for the checkpoint's files.
"""
