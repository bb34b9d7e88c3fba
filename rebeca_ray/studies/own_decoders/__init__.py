"""The methods that change the decoder itself for a user: a LoRA, or attention to the user's images.

May import: `studies`, and all that it may import.
Must not hold: methods that give the catalog's decoder other embeddings or prompts.
"""
