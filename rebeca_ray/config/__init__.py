"""Config: the settings of each job as a frozen, strict model, its sections, and the YAML loader.

May import: `storage`, and whatever `storage` may.
Must not hold: the work that a config describes; reading the environment; Ray or torch.
"""
