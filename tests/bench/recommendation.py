"""Does it recommend? Generated images beside other methods, on populations without any tuning.

The script simulates a population per seed, trains the stickers' prior on it and a prior without users, and
publishes two catalogs: ten items each for 210 users of the training, and for 84 users whom no training
saw. `rebeca evaluate` compares the first with the other methods, for 70 of its users. The true like
probability is that of the simulation, read by the judge from the drawn images.

Folders of an earlier start, or of `prior_quality.py`, are not made again.

    python -m tests.bench.recommendation [--seeds 101 102 103] [--methods p1 …] [--data runs/prior_quality]
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.evaluation import EvaluateConfig
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import load_config
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import read_interactions
from rebeca_ray.evaluation.permutation import PermutationTest, permutation_test, permutation_test_by_image
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.schemas import TEST
from rebeca_ray.stickers.build.data import to_pixels
from rebeca_ray.stickers.captions import caption_sources
from rebeca_ray.stickers.judge import Judge
from rebeca_ray.stickers.truth import Truth, true_like_of
from rebeca_ray.studies.evaluate import evaluate
from rebeca_ray.studies.metrics import Metrics
from tests.bench.population import ROOT, SPLIT, embed_stickers, simulate_populations, train_stickers

RESULTS = Path(__file__).parent / "results" / "recommendation.json"
SEEN_USERS, UNSEEN_USERS, COMPARED_USERS = 210, 84, 70
IMAGES_PER_USER = 10
WITHOUT_USERS = ("empty_prompt", "p1", "p2", "no_user", "most_popular", "random")
METHODS = (*WITHOUT_USERS, "persona", "nearest_to_mean", "retrieval")


def users_with_test_likes(path: Path, count: int) -> list[str]:
    """Return users with a liked test rating, evenly spaced."""
    interactions = read_interactions(InteractionSettings(path=str(path), **SPLIT))
    liked = (interactions.split == TEST) & (interactions.like == 1)
    users = interactions.user_id[np.unique(interactions.user_index[liked])].tolist()
    return [users[row] for row in np.linspace(0, len(users) - 1, count).astype(int)]


def publish(folder: Path, name: str, items: str, num_users: int) -> Snapshot:
    """Return the catalog of the users in `folder/name`, generated unless an earlier start did."""
    catalog, population = folder / f"catalog-{name}", folder / name
    pointer = catalog / "latest.json"
    if not (pointer.exists() and json.loads(pointer.read_text())["snapshot"]):
        request = population / "evaluated.parquet"
        users = users_with_test_likes(population / "interactions.parquet", num_users)
        pq.write_table(pa.table({"user_id": users}), request)
        overrides = [f"prior={folder}/history", f"request={request}", f"items={items}", f"catalog={catalog}"]
        overrides += [f"interactions.path={population}/interactions.parquet", "hide_hold_out=true"]
        overrides += [f"interactions.{key}={value}" for key, value in SPLIT.items()]
        overrides += [f"num_images={IMAGES_PER_USER}"]
        generate_catalog(load_config(GenerateConfig, ROOT / "jobs/configs/generate_stickers.yaml", overrides))
    return read_catalog(str(catalog))


def true_likes(snapshot: Snapshot, truth: Path) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the users, the user [N] of each image, and the true like probability [U, N] of all pairs."""
    items = snapshot.items(["user_id", "image_file", "image_row"]).sort_by("user_id")
    owners = items["user_id"].to_pylist()
    users, user_N = np.unique(owners, return_inverse=True)
    of = Truth(truth, Judge(), users.tolist())
    joint_NSC = of.joint(to_pixels(snapshot.images(items))) * ~np.isnan(of.like_USC[0])
    joint_NSC /= joint_NSC.sum((1, 2), keepdims=True)
    return users.tolist(), user_N, np.einsum("usc,nsc->un", np.nan_to_num(of.like_USC), joint_NSC)


def by_user(like_UN: np.ndarray, user_N: np.ndarray) -> np.ndarray:
    """Return the mean [U, U] of each user over the images of each user."""
    return np.stack([like_UN[:, user_N == user].mean(1) for user in range(len(like_UN))], axis=1)


def in_short(test: PermutationTest) -> dict[str, float]:
    """Return the figures of a permutation test."""
    return {
        "matched": test.matched_mean,
        "shuffled": test.null_mean,
        "effect": test.effect,
        "z": test.z,
        "p": test.p_value,
    }


def one_seed(seed: int, data: Path, users: int, methods: list[str]) -> dict[str, Any]:
    """Return the figures of one population."""
    items, folder = embed_stickers(data), data / f"seed-{seed}"
    if not (folder / "unseen" / "truth.parquet").exists():
        simulate_populations(data, seed, users)
    for name, user_encoder in (("history", "history"), ("noue", "none")):
        if not (folder / name / "prior.json").exists():
            train_stickers(folder, name, items, seed, user_encoder)
    seen = publish(folder, "seen", items, SEEN_USERS)
    unseen = publish(folder, "unseen", items, UNSEEN_USERS)

    _, user_N, like_UN = true_likes(seen, folder / "seen" / "truth.parquet")
    _, unseen_N, unseen_UN = true_likes(unseen, folder / "unseen" / "truth.parquet")
    seen_UU, unseen_UU = by_user(like_UN, user_N), by_user(unseen_UN, unseen_N)
    metrics = compare(folder, items, seed, methods)
    return {
        "permutation": in_short(permutation_test(seen_UU)),
        "permutation by image": in_short(permutation_test_by_image(like_UN, user_N)),
        "seen": float(seen_UU.diagonal().mean()),
        "unseen": float(unseen_UU.diagonal().mean()),
        "verifier": {
            "auc": metrics.verifier.seen.auc.value,
            "pairwise accuracy": metrics.verifier.seen.pairwise_accuracy.value,
        },
        "methods": {part.name: method_figures(metrics, part.name) for part in metrics.sets},
    }


def compare(folder: Path, items: str, seed: int, methods: list[str]) -> Metrics:
    """Return the metrics of the catalog of seen users and of methods."""
    overrides = [f"catalog={folder}/catalog-seen", f"items={items}", f"prior={folder}/history"]
    overrides += [f"interactions.path={folder}/seen/interactions.parquet", f"out={folder}/evaluation"]
    overrides += [f"interactions.{key}={value}" for key, value in SPLIT.items()]
    overrides += [f"training_seed={seed}", f"verifier_seed={seed + 1000}"]
    overrides += [f"without_users={folder}/noue", f"methods=[{','.join(methods)}]"]
    overrides += [f"num_users={COMPARED_USERS}"]
    config = load_config(EvaluateConfig, ROOT / "jobs/configs/evaluate_stickers.yaml", overrides)
    return evaluate(config, true_like_of(folder / "seen" / "truth.parquet"), caption_sources()).metrics


def method_figures(metrics: Metrics, name: str) -> dict[str, Any]:
    """Return the figures of one set that the claim is about; those of the images, embedded again."""
    part = next(part for part in metrics.sets if part.name == name)
    figures = part.spaces["clip"]
    result = {
        "true like probability": part.true_like_probability.model_dump(),
        "like probability": figures.like_probability.model_dump(),
        "z": figures.permutation[0].z,
        "mmd": figures.distances.mmd,
        "frechet": figures.distances.frechet,
        "vendi": figures.vendi.mean,
        "cosine within": figures.cosine_within.mean,
        "cosine across": figures.cosine_across.mean,
        "near-copies": figures.copy_share,
        "topic precision": {kind: mean.mean for kind, mean in part.topic_precision.items()},
    }
    against = [c for c in metrics.comparisons if c.right == name and c.figure == "true_like_probability"]
    if against:
        result["catalog against it"] = against[0].model_dump()
    return result


def report(seeds: dict[str, dict[str, Any]]) -> None:
    """Print the figures, as means over the seeds."""
    table = Table(
        "", "seeds", "true like probability", "z", "MMD × 1000", "Fréchet", "Vendi", "users who gain"
    )
    for name in ("catalog", *METHODS):
        parts = [part for figures in seeds.values() if (part := figures["methods"].get(name))]
        if not parts:
            continue
        true = [part["true like probability"] for part in parts]
        ends = [f"{np.mean([t[end] for t in true]):.3f}" for end in ("mean", "low", "high")]
        means = [f"{np.mean([part[key] for part in parts]):.3f}" for key in ("z", "mmd", "frechet", "vendi")]
        gains = [part["catalog against it"]["win_share"] for part in parts if "catalog against it" in part]
        gain = f"{np.mean(gains):.0%}" if gains else ""
        table.add_row(name, str(len(parts)), f"{ends[0]} [{ends[1]}, {ends[2]}]", *means, gain)
    console = Console()
    console.print(table)
    for seed, figures in seeds.items():
        test, by_image = figures["permutation"], figures["permutation by image"]
        console.print(
            f"seed {seed}, {SEEN_USERS} × {IMAGES_PER_USER}: {test['matched']:.3f} for their users, "
            f"{test['shuffled']:.3f} for others, z {test['z']:.1f}, by image {by_image['z']:.1f}; "
            f"users never seen {figures['unseen']:.3f}, "
            f"{figures['unseen'] / figures['seen']:.1%} of users seen"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="*", default=[101, 102, 103], help="seeds to measure")
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=METHODS)
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--data", type=Path, default=Path("runs/prior_quality"))
    arguments = parser.parse_args()
    seeds: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for seed in arguments.seeds:
        seeds[str(seed)] = one_seed(seed, arguments.data.absolute(), arguments.users, arguments.methods)
        RESULTS.write_text(json.dumps(seeds, indent=2) + "\n")
    report(seeds)


if __name__ == "__main__":
    main()
