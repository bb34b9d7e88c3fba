"""Config: what a person can set. One frozen, strict model a job, its sections, and how a YAML file becomes one.

May import: `storage`, and what storage may.
Must not hold: the work a config describes; reading the environment; Ray or torch.
"""
