"""Write the first configs for people's data, embed.yaml, train.yaml, generate.yaml, with reasons.

`Look`, `Machine` -> a tree of `Setting`s per job -> YAML with a comment above each value -> a folder, at once
"""

import os
import textwrap
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import yaml

from rebeca_ray.config.jobs import EmbedConfig, GenerateConfig, JobConfig, TrainConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.data.first_look.look import Look, write_request, write_tables_of
from rebeca_ray.data.published.write import check_out, new_folder
from rebeca_ray.errors import InputError, shown
from rebeca_ray.storage.filesystem import join

MODELS: dict[str, type[JobConfig]] = {"embed": EmbedConfig, "train": TrainConfig, "generate": GenerateConfig}
CLIP = "ViT-H-14/laion2b_s32b_b79k"  # that the IP-Adapter in generate.yaml reads
SMALL_USERS = 5_000  # with fewer, the small network is large enough
SMALL_DRAWS = 48_000  # per epoch of the small network, as many as in the demo
MAX_DRAWS_PER_USER = 480
MAX_STEPS = 10_000  # per epoch, so that each ends within the hour
FEW_CORES = 4
NO_NAME = ("Cc", "Cs", "Zl", "Zp")  # categories of characters that a line of YAML cannot hold
WIDTH = 106  # of a line of comment


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The device and the number of cores that the configs are for."""

    device: str
    cores: int


@dataclass(frozen=True)
class Setting:
    """A value, and the reason for it."""

    value: str | float | list[float]
    why: str = ""


Tree = Mapping[str, Union[Setting, "Tree"]]


def this_machine() -> Machine:
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(device="cuda" if torch.cuda.is_available() else "cpu", cores=cores)


def check_folder(folder: str, interactions: str, items: str) -> None:
    """Raise InputError unless `folder` can become a new folder on this disk, outside of the data."""
    if "://" in folder:
        raise InputError(f"{folder}: is no local folder, where --config reads; give a folder on this machine")
    for name in (folder, interactions, items):
        if any(unicodedata.category(character) in NO_NAME for character in name):
            raise InputError(f"{shown(name)}: holds a control character, or is not UTF-8; rename it")
    if Path(folder) == Path.cwd():
        raise InputError(f"{folder}: is the current folder, which would be replaced; name a new folder in it")
    for what, uri in (("interactions", interactions), ("items", items)):
        if f"{folder}/".startswith(f"{uri.rstrip('/')}/"):
            raise InputError(
                f"{folder}: lies in the {what} {uri}, so jobs would read it as data; give one beside them"
            )
    check_out(folder)


def write_folder(view: Look, folder: str, machine: Machine) -> list[str]:
    """Write tables, a request and configs, which appear together as `folder`. Returns the names written.

    Every config is loaded as its job loads it before anything appears.
    """
    with new_folder(folder) as partial:
        Path(partial).mkdir(parents=True)
        write_tables_of(view, partial)
        write_request(view, join(partial, "request.parquet"), request_size(machine))
        for job, model in MODELS.items():
            path = Path(partial) / f"{job}.yaml"
            path.write_text(config_text(job, view, folder, machine))
            load_config(model, path)
    return sorted(path.name for path in Path(folder).iterdir())


def config_text(job: str, view: Look, folder: str, machine: Machine) -> str:
    """Return the YAML of one job, with comments."""
    trees = {"embed": embed_tree, "train": train_tree, "generate": generate_tree}
    title = {
        "embed": "Embed the images with CLIP.",
        "train": "Train a prior: the model of each user's taste.",
        "generate": "Generate the next snapshot of the catalog.",
    }[job]
    lines = [
        f"# {title} `rebeca init` wrote this file; change any value.",
        "",
        *render(trees[job](view, folder, machine)),
    ]
    return "\n".join(lines) + "\n"


def embed_tree(view: Look, folder: str, machine: Machine) -> Tree:
    bad = len(view.items.bad_images)
    is_refused = bad and not view.converts_items
    return {
        "items": Setting(items_uri(view, folder), "Ids and encoded images."),
        "clip": Setting(
            CLIP,
            "The CLIP that the IP-Adapter in generate.yaml reads. Other adapters may read another one.",
        ),
        "out": Setting(join(folder, "embedded")),
        **(
            {"bad_images": Setting("drop", f"{bad:,} images do not open. They are left out.")}
            if is_refused
            else {}
        ),
        "batch_size": Setting(256 if machine.device == "cuda" else 16, "Images per forward pass."),
        "device": Setting(machine.device, seen(machine)),
        **few_cores(machine),
    }


def train_tree(view: Look, folder: str, machine: Machine) -> Tree:
    users = view.taste.users - view.taste.cold_start_users
    is_small = machine.device == "cpu" or users < SMALL_USERS
    tree: dict[str, Setting | Tree] = {}
    if is_small:
        reason = "on a CPU" if machine.device == "cpu" else "for so few users"
        tree["preset"] = Setting("stickers", f"{users:,} users to learn from, {reason}: the small network.")
        tree["network"] = {
            "num_tokens": Setting(
                8, "An embedding of a large CLIP has 768 or 1024 numbers. Each token holds an eighth of them."
            ),
            "user_encoder": Setting(
                "history",
                "Reads a user's ratings, so that new users need no new training. `id` is as published.",
            ),
        }
    tree |= {
        "interactions": interactions_tree(view, folder),
        "items": Setting(join(folder, "embedded"), "Written by `rebeca embed`."),
        "out": Setting(join(folder, "prior")),
        "storage": Setting(join(folder, "train"), "Checkpoints: a killed training resumes from here."),
        "optimization": small_optimization(users) if is_small else large_optimization(users),
        "workers": {
            "num_workers": Setting(1, "More of them share each batch, on more machines or GPUs."),
            "device": Setting(machine.device, seen(machine)),
            "threads_per_worker": Setting(min(machine.cores, 8), f"This machine has {machine.cores} cores."),
        },
    }
    return tree


def small_optimization(users: int) -> Tree:
    draws = max(1, min(MAX_DRAWS_PER_USER, SMALL_DRAWS // max(users, 1)))
    tree = {
        "samples_per_user": Setting(draws, f"For {users:,} users, about {draws * users:,} draws per epoch.")
    }
    if draws * users > 256 * MAX_STEPS:
        tree["steps_per_epoch"] = Setting(MAX_STEPS, "One pass over all users would take hours.")
    return tree


def large_optimization(users: int) -> Tree:
    tree = {"samples_per_user": Setting(100, "As published.")}
    if 100 * users > 64 * MAX_STEPS:
        tree["steps_per_epoch"] = Setting(
            MAX_STEPS, f"One pass over {users:,} users would take hours, without a checkpoint."
        )
    return tree


def generate_tree(view: Look, folder: str, machine: Machine) -> Tree:
    is_gpu = machine.device == "cuda"
    return {
        "prior": Setting(join(folder, "prior"), "Written by `rebeca train`."),
        "request": Setting(
            join(folder, "request.parquet"),
            f"The {request_size(machine)} users with the most likes, for a first look. "
            "Name a Parquet file with all your users in `user_id` when you are content.",
        ),
        "interactions": interactions_tree(view, folder),
        "items": Setting(join(folder, "embedded"), "Generated images must not copy these."),
        "catalog": Setting(join(folder, "catalog"), "A folder, or an address such as s3://bucket/catalog."),
        "num_images": Setting(4 if is_gpu else 2, "Images per user, few for a first look."),
        "decoder": {
            "model": Setting(
                "stable-diffusion-v1-5/stable-diffusion-v1-5",
                "Any Stable Diffusion 1.x: a name of the model hub, or a folder. XL needs another adapter.",
            ),
            "ip_adapter_repo": Setting(
                "h94/IP-Adapter", "A plain IP-Adapter. Those called plus or faceid do not fit."
            ),
            "ip_adapter": Setting(
                "models/ip-adapter_sd15.safetensors",
                "For Stable Diffusion XL: sdxl_models/ip-adapter_sdxl_vit-h.safetensors. "
                "Do not take ip-adapter_sdxl, for it reads a CLIP of 1280 numbers.",
            ),
            "device": Setting(
                machine.device, seen(machine) + ("" if is_gpu else " It takes minutes for each image.")
            ),
            "dtype": Setting("auto", "The fastest number format that the machine computes."),
            **(
                {}
                if is_gpu
                else {"batch_size": Setting(2, "Images that are decoded together: few fit into memory.")}
            ),
            **few_cores(machine),
        },
        "sampler": {"device": Setting(machine.device, seen(machine)), **few_cores(machine)},
    }


def interactions_tree(view: Look, folder: str) -> Tree:
    """Return the section that training and generation share."""
    ratings, taste = view.ratings, view.taste
    is_same = view.interactions_in_form
    tree: dict[str, Setting | Tree] = {
        "path": Setting(
            ratings.source.uri if is_same else join(folder, "interactions.parquet"),
            "Your file, unchanged." if is_same else f"Converted from {shown(ratings.source.uri)}.",
        )
    }
    if is_same and ratings.source.columns:
        names = {declared: Setting(name) for declared, name in ratings.source.columns.items()}
        tree["columns"] = names
    if view.threshold:
        share = taste.likes / taste.ratings
        tree["rating_scale"] = Setting(list(view.threshold.scale), "Lowest and highest possible rating.")
        tree["like_threshold"] = Setting(
            view.threshold.like, f"{share:.0%} of the ratings are likes: {view.threshold.reason}."
        )
    order = (
        "The times say which ratings are the latest."
        if view.has_times
        else "Without times, no rating is the latest."
    )
    if taste.median_ratings >= 20:
        tree["hold_out"] = Setting(0.1, f"A tenth of each user's ratings validates, drawn by a hash. {order}")
    else:
        tree["hold_out"] = Setting(
            1.0,
            f"One rating per user validates, drawn by a hash. The median user has {taste.median_ratings:g}. "
            + order,
        )
    if view.lost_ratings:
        tree["unknown_items"] = Setting(
            "drop",
            f"{view.lost_ratings:,} ratings are of items without an image. `refuse` would end the job.",
        )
    return tree


def items_uri(view: Look, folder: str) -> str:
    return join(folder, "items") if view.converts_items else view.items.uri


def request_size(machine: Machine) -> int:
    return 100 if machine.device == "cuda" else 20


def seen(machine: Machine) -> str:
    return (
        "This machine has a GPU." if machine.device == "cuda" else "This machine has no GPU that torch sees."
    )


def few_cores(machine: Machine) -> dict[str, Setting]:
    if machine.cores >= FEW_CORES:
        return {}
    return {"cpus_per_actor": Setting(0.5, f"Of {machine.cores} cores, one stays free for reading.")}


def next_commands(folder: str) -> list[list[str]]:
    """Return the commands to run next, in words."""
    jobs = [["rebeca", job, "--config", join(folder, f"{job}.yaml")] for job in MODELS]
    return [*jobs, ["rebeca", "gallery", join(folder, "catalog")]]


def render(tree: Tree, indent: str = "") -> list[str]:
    """Return the lines of a YAML mapping, with the reason above each value."""
    lines = []
    for key, node in tree.items():
        if isinstance(node, Setting):
            lines += [f"{indent}# {line}" for line in wrapped(node.why, WIDTH - len(indent))]
            lines.append(f"{indent}{key}: {scalar(node.value)}")
        else:
            lines += [f"{indent}{key}:", *render(node, f"{indent}  ")]
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text. Names with hyphens stay whole."""
    return textwrap.wrap(text, width, break_on_hyphens=False)


def scalar(value: str | float | list[float]) -> str:
    """Return a value as YAML in one line. A text is quoted, so that it stays a text."""
    style = '"' if isinstance(value, str) and not value.replace("_", "").isalpha() else None
    text = yaml.safe_dump(
        value, default_style=style, default_flow_style=True, allow_unicode=True, width=10**9
    )
    return text.removesuffix("\n").removesuffix("\n...")
