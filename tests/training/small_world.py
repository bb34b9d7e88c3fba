"""The training of the small world, and what it wrote."""

from pathlib import Path

from rebeca_ray.catalog.versions import current_version
from rebeca_ray.config.jobs import TrainConfig


def training_csv(config: TrainConfig) -> list[str]:
    return Path(current_version(config.out, "prior"), "training.csv").read_text().splitlines()


def configure(world: dict[str, str], user_encoder: str = "id", **optimization: object) -> TrainConfig:
    return TrainConfig.model_validate(
        {
            "interactions": {"path": world["interactions"]},
            "items": world["items"],
            "out": f"{world['folder']}/prior",
            "storage": f"{world['folder']}/storage a+b%20[1]*",
            "network": {
                "num_layers": 2,
                "num_heads": 2,
                "width": 32,
                "num_tokens": 2,
                "user_encoder": user_encoder,
                "max_history": 24,
            },
            "diffusion": {"num_train_timesteps": 100},
            "optimization": {
                "learning_rate": 3e-3,
                "user_learning_rate": 0.3,
                "batch_size": 64,
                "samples_per_user": 1024,
                "max_epochs": 6,
                "ema_decay": 0.9,
                **optimization,
            },
            "workers": {"cpus_per_worker": 0.5},
        }
    )
