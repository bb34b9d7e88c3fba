"""The two halves of a night by themselves: embeddings of users, and images of embeddings.

May import: generation and all below.
Must not hold: catalogs, runs, pages.
"""
