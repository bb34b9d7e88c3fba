"""Provenance: the marks that a machine made an image, as an XMP packet and as a signed C2PA manifest.

May import: `config`, and its imports.
Must not hold: decoders, catalogs, Ray.
"""
