"""Prior: the mathematics that samples embeddings a user would like, and the directory of a trained prior.

May import: `config`, `storage`, and all that they may import.
Must not hold: Ray, catalogs, images. All but the checkpoint are functions of arrays and tensors.
"""
