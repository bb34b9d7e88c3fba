"""Named starting points of a training config. The config's settings override them.

`paper-v1` and `paper-v2` have the papers' sizes and settings, with networks of our own.

The papers do not give the width of the first network. With a single image token, a width below the
embedding's D would lose part of the noise. So the width here is 1024, the D of the papers' CLIP.
"""

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper-v1": {
        "network": {
            "architecture": "decoder_only",
            "num_layers": 8,
            "num_heads": 16,
            "width": 1024,
            "num_tokens": 1,
            "user_encoder": "id",
            "num_user_tokens": 4,
        },
        "diffusion": {"num_train_timesteps": 1000, "prediction_type": "epsilon"},
        "optimization": {
            "learning_rate": 1e-4,
            "weight_decay": 1e-5,
            "batch_size": 64,
            "samples_per_user": 80,
        },
    },
    "paper-v2": {
        "network": {
            "architecture": "cross_attention",
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
        "optimization": {"learning_rate": 1e-4, "batch_size": 64, "samples_per_user": 100},
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
