"""Build: the scripts that made the bundled world: drawings, CLIP, autoencoder, UNet, judge.

May import: `stickers`, and all that it may import.
Must not hold: anything that the product needs when it runs.
"""
