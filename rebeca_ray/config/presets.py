"""Named starting points of a training config. The config's settings override them.

`paper-v1` and `paper-v2` are the networks and settings of the two versions of the paper, as their authors ran
them, with their bugs. Where they ran several values, the smallest is taken.
"""

from typing import Any

AS_PUBLISHED: dict[str, Any] = {  # in both versions
    "learning_rate": 1e-4,
    "weight_decay": 1e-5,
    "user_optimizer": "adamw",
    "user_learning_rate": 1e-4,
    "batch_size": 64,
    "with_replacement": False,
    "max_epochs": 2001,
    "plateau_patience": 5,
    "ema_decay": 0.0,
    "gradient_clip": None,
}

PRESETS: dict[str, dict[str, Any]] = {
    "paper-v1": {
        "interactions": {"min_likes": 100, "hold_out": 10.0, "test": 10.0},
        "network": {
            "architecture": "paper_v1",
            "num_layers": 8,
            "num_heads": 16,
            "width": 1024,
            "num_tokens": 1,
            "user_encoder": "id",
            "num_user_tokens": 4,
        },
        "diffusion": {"num_train_timesteps": 6000, "schedule": "linear", "prediction_type": "epsilon"},
        # Their sampler clips to ±1, although the embeddings reach 1.3.
        "scaling": {"normalise": False, "clamp": None, "clip_sample": 1.0},
        "optimization": {
            **AS_PUBLISHED,
            "samples_per_user": 80,
            "early_stopping_patience": 20,
            "user_dropout": 0.0,
            "rating_dropout": 0.0,
            "joint_dropout": 0.1,
        },
    },
    "paper-v2": {
        "interactions": {"min_likes": 0, "hold_out": 10.0, "test": 10.0},
        "network": {
            "architecture": "paper_v2",
            "num_layers": 6,
            "num_heads": 8,
            "width": 128,
            "num_tokens": 32,
            "user_encoder": "id",
            "num_user_tokens": 1,
        },
        "diffusion": {
            "num_train_timesteps": 1000,
            "schedule": "squaredcos_cap_v2",
            "prediction_type": "sample",
        },
        "scaling": {"normalise": False, "clamp": None},
        "optimization": {**AS_PUBLISHED, "samples_per_user": 100, "early_stopping_patience": 50},
    },
    "stickers": {
        "network": {
            "num_layers": 3,
            "num_heads": 4,
            "width": 96,
            "num_tokens": 1,
            "user_encoder": "history",
            "max_history": 64,
        },
        "optimization": {
            "learning_rate": 2.5e-3,
            "user_learning_rate": 0.3,
            "batch_size": 256,
            "samples_per_user": 24,
            "like_share": 1.0,
            "max_epochs": 7,
            "schedule": "linear",
            "ema_decay": 0.99,
        },
    },
}
