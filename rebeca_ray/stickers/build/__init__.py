"""How the bundled world was made: drawings, CLIP, autoencoder, UNet, judge. Each module is a script.

May import: `stickers`, and what it may.
Must not hold: anything the product needs when it runs.
"""
