"""Single files: a whole model in its authors' layout, beside a folder of its configs, and pickles.

May import: `headers` of the decoder, and its imports.
Must not hold: folders in diffusers' layout, hubs, families.
"""
