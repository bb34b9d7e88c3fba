"""Families: one module per model family; it loads weights, encodes prompts and names the inputs of networks.

May import: `conditioning`, `networks`, `interface` and `files` of the decoder, and their imports.
Must not hold: the denoising loop, engines, the file format of an export.
"""
