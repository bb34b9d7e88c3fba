"""Evaluate a catalog, or compare two: `rebeca evaluate`.

catalogs ─► sets ─┐
ratings ─► verifier ─► figures per set and feature space ─► comparisons ─► metrics.json, plots, report.html

Shapes: U users, N items, D embed dim.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.catalog.snapshots import check_user_key
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.evaluation import IMAGE_METHODS, EvaluateConfig
from rebeca_ray.data.items import EmbeddedItems, read_image_embeds
from rebeca_ray.decoder.build import build_decoder
from rebeca_ray.errors import InputError
from rebeca_ray.evaluation.paired import compare_users
from rebeca_ray.identity import read_user_key
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.progress import counting
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.objects import write_json
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.writable import require_writable
from rebeca_ray.studies.drawing import draw_set, fingerprint_of, without_gaps
from rebeca_ray.studies.guidance import check_guidable, guidance_cells
from rebeca_ray.studies.measure import LESS_IS_BETTER, Judge, Measured, mean_of, measure
from rebeca_ray.studies.methods import Materials, wishes_of
from rebeca_ray.studies.metrics import Comparison, GuidanceCell, Metrics, SetFigures, VerifierFigures
from rebeca_ray.studies.own_decoders.draw import draw_with_own_decoder
from rebeca_ray.studies.own_decoders.lora import check_trainable
from rebeca_ray.studies.perceptual import LPIPS, PerceptualJudge
from rebeca_ray.studies.ratings import StudyRatings, read_ratings
from rebeca_ray.studies.sets import ItemSet, TrueLike, choose_users, read_set
from rebeca_ray.studies.spaces import CLIP, Space, read_spaces
from rebeca_ray.studies.topics import CaptionSource, TopicJudge, fit_topic_judge, read_sources
from rebeca_ray.studies.verifying import fit_study_verifier

log = logging.getLogger(__name__)

NUM_PERMUTATIONS = 10_000
TRUE_LIKE = "true_like_probability"
TOPICS = "topic_precision/"


@dataclass(frozen=True, kw_only=True)
class MeasuredSet:
    """A set of items, its figures by feature space, and figures [U] of its users outside any space."""

    items: ItemSet
    spaces: dict[str, Measured]
    by_user: dict[str, np.ndarray]

    def figures_by_user(self) -> dict[str, np.ndarray]:
        """Return all figures of the users by name. Those of a space have its name before them."""
        in_spaces = {
            f"{space}/{name}": figure_U
            for space, part in self.spaces.items()
            for name, figure_U in part.by_user.items()
        }
        return in_spaces | self.by_user

    def record(self, seed: int) -> SetFigures:
        """Return the set in the form of `metrics.json`."""
        means = {
            name: mean_of(figure_U, seed, greater_is_better=name not in LESS_IS_BETTER)
            for name, figure_U in self.by_user.items()
        }
        return SetFigures(
            name=self.items.name,
            description=self.items.description,
            users=len(self.items.user_id),
            items=len(self.items.user_N),
            spaces={space: part.figures for space, part in self.spaces.items()},
            topic_precision={
                name.removeprefix(TOPICS): mean for name, mean in means.items() if name.startswith(TOPICS)
            },
            lpips=means.get(LPIPS),
            true_like_probability=means.get(TRUE_LIKE),
        )


@dataclass(frozen=True, kw_only=True)
class Study:
    """The result of a study: its metrics, and each set with its figures. The catalog is the first set."""

    metrics: Metrics
    sets: list[MeasuredSet]
    judge: Judge


def evaluate(
    config: EvaluateConfig, true_like: TrueLike | None = None, captions: Sequence[CaptionSource] = ()
) -> Study:
    """Evaluate the catalogs of `config`, and write `metrics.json` and `users.parquet` to `config.out`.

    `true_like` gives true like probabilities, where users are simulated, and `captions` joins those of the
    config. Raises InputError for catalogs, items, ratings or a CLIP that do not fit each other, and for too
    few users.
    """
    require_writable(config.out, "out")
    snapshots, users, judge, verifier = read_inputs(config)
    spaces, verifiers = read_spaces(config, judge)
    sources = different([*captions, *read_sources(config)])
    topics = [fit_topic_judge(source, judge, config) for source in sources]
    perceptual = PerceptualJudge(config.lpips, judge, config) if config.lpips else None
    names = ("catalog", "other")[: len(snapshots)]
    sets = [read_set(name, snapshot, users) for name, snapshot in zip(names, snapshots, strict=True)]
    cells: list[GuidanceCell] = []
    if config.decoder and (config.methods or config.prior_guidance_tried):
        materials = read_materials(config, sets[0], judge, sources)
        # Everything is checked before the first image is drawn.
        check_models(config.decoder, materials.prior, snapshots[0])
        config = config.model_copy(update={"decoder": without_gaps(config.decoder)})
        assert config.decoder is not None
        if config.prior_guidance_tried:
            check_guidable(materials.prior)
        for method in IMAGE_METHODS & set(config.methods):
            check_trainable(method, config.decoder)
        wishes = {
            method: wishes_of(method, materials) for method in config.methods if method not in IMAGE_METHODS
        }
        decoder = build_decoder(config.decoder)
        sets += [
            draw_set(method, wishes[method], sets[0], decoder, config.decoder, config.out)
            if method in wishes
            else draw_with_own_decoder(method, materials, config)
            for method in config.methods
        ]
        if config.prior_guidance_tried:
            clip = next(space for space in spaces if space.name == CLIP)
            cells = guidance_cells(config, materials, decoder, config.decoder, clip, true_like)
    measured = []
    with counting("measure sets", len(sets)) as counted:
        for item_set in sets:
            measured.append(measure_set(item_set, spaces, topics, perceptual, true_like))
            counted.add()
    metrics = Metrics(
        verifier=verifier,
        verifiers=verifiers,
        sets=[part.record(config.seed) for part in measured],
        guidance=cells,
        comparisons=compare_sets(measured, config.seed),
    )
    write_table(users_table(measured), join(config.out, "users.parquet"), row_group_size=10_000)
    write_json(metrics.model_dump(mode="json"), join(config.out, "metrics.json"))
    return Study(metrics=metrics, sets=measured, judge=judge)


def read_inputs(config: EvaluateConfig) -> tuple[list[Snapshot], list[str], Judge, VerifierFigures]:
    """Return the snapshots, the users of the study, and their judge with the figures of its verifier."""
    items = read_image_embeds(config.items)
    ratings = read_ratings(config.interactions, items)
    snapshots = [read_catalog(root) for root in (config.catalog, config.other) if root is not None]
    for snapshot in snapshots:
        check_user_key(snapshot.root, read_user_key(config.user_key))
        check_fit(snapshot.root, snapshot.manifest.embed_dim, items, config.items)
    log.info(f"fitting the verifier to {int(ratings.parts.fit_N.sum()):,} ratings")
    verifier, figures = fit_study_verifier(ratings, config)
    users = choose_users(snapshots, judged_users(ratings, verifier.num_ratings_V), config.num_users)
    index_of = {user: row for row, user in enumerate(ratings.interactions.user_id.tolist())}
    judge = Judge(
        ratings=ratings,
        verifier=verifier,
        user_U=np.array([index_of[user] for user in users]),
        max_item_similarity=config.max_item_similarity,
        num_permutations=NUM_PERMUTATIONS,
        seed=config.seed,
    )
    return snapshots, users, judge, figures


def measure_set(
    item_set: ItemSet,
    spaces: list[Space],
    topics: list[TopicJudge],
    perceptual: PerceptualJudge | None,
    true_like: TrueLike | None,
) -> MeasuredSet:
    """Return a set with all its figures."""
    log.info(f"measuring {len(item_set.user_N):,} items of {item_set.description}")
    in_spaces = {
        space.name: measure(item_set, x_ND, space.judge, space.name)
        for space in spaces
        if (x_ND := space.features_of(item_set)) is not None
    }
    by_user = {TOPICS + topic.name: topic.precision(item_set) for topic in topics}
    if perceptual is not None:
        by_user[LPIPS] = perceptual.distances(item_set)
    if true_like is not None:
        by_user[TRUE_LIKE] = item_set.mean_by_user(true_like(item_set.owners(), item_set.encoded))
    return MeasuredSet(items=item_set, spaces=in_spaces, by_user=by_user)


def read_materials(
    config: EvaluateConfig, catalog: ItemSet, judge: Judge, sources: Sequence[CaptionSource]
) -> Materials:
    """Return all that methods and the guidance figure are made from."""
    assert config.prior is not None  # the config requires it
    without_users = load_prior(config.without_users) if config.without_users else None
    return Materials(
        catalog=catalog,
        judge=judge,
        prior=load_prior(config.prior),
        captions=[source.real for source in sources],
        without_users=without_users,
        seed=config.seed,
    )


def different(sources: list[CaptionSource]) -> list[CaptionSource]:
    """Return the sources of captions. Raises InputError if two have the same name."""
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"captions: two sources are named {name}; leave out --truth, or the prompts of caption_model"
            )
    return sources


def check_models(decoder: DecoderSettings, prior: TrainedPrior, snapshot: Snapshot) -> None:
    """Raise InputError if the catalog was made by another prior or decoder than methods would use."""
    versions = snapshot.manifest.versions
    for name, fingerprint in (("prior", prior.fingerprint), ("decoder", fingerprint_of(decoder))):
        if fingerprint != versions.get(name):
            raise InputError(
                f"{name}: its fingerprint is {fingerprint}; that of catalog {snapshot.root} is "
                f"{versions.get(name)}; give the {name} and the settings that made the catalog"
            )


def check_fit(root: str, embed_dim: int, items: EmbeddedItems, uri: str) -> None:
    """Raise InputError if a catalog's embeddings have another size than the real items'."""
    if embed_dim != items.image_embeds.shape[1]:
        raise InputError(
            f"catalog {root}: embeddings of size {embed_dim}; "
            f"items {uri} have {items.image_embeds.shape[1]}; give the items that its prior was trained on"
        )


def judged_users(ratings: StudyRatings, num_ratings_V: np.ndarray) -> list[str]:
    """Return the users with a liked test rating whom the verifier knows."""
    interactions = ratings.interactions
    known = np.zeros(interactions.num_users, bool)
    known[: len(num_ratings_V)] = num_ratings_V > 0
    has_test_like = [len(ratings.likes_of_test(user)) > 0 for user in range(interactions.num_users)]
    return interactions.user_id[known & np.array(has_test_like)].tolist()


def compare_sets(sets: list[MeasuredSet], seed: int) -> list[Comparison]:
    """Return the comparisons of the first set with each other set, in every figure that both have."""
    first, *others = sets
    comparisons = []
    for other in others:
        names, right = (first.items.name, other.items.name), other.figures_by_user()
        comparisons += [
            compare_figure(figure, left_U, right[figure], names=names, seed=seed)
            for figure, left_U in first.figures_by_user().items()
            if figure in right
        ]
    return comparisons


def compare_figure(
    figure: str, left_U: np.ndarray, right_U: np.ndarray, *, names: tuple[str, str], seed: int
) -> Comparison:
    """Return one comparison, over the users who have the figure in both sets."""
    both = np.isfinite(left_U) & np.isfinite(right_U)
    paired = compare_users(left_U[both], right_U[both], seed)
    is_less_better = figure.rpartition("/")[2] in LESS_IS_BETTER
    lose_share = 1 - paired.win_share - paired.tie_share
    return Comparison(
        figure=figure,
        left=names[0],
        right=names[1],
        users=paired.num_users,
        difference=paired.difference,
        low=paired.difference_interval.low,
        high=paired.difference_interval.high,
        win_share=lose_share if is_less_better else paired.win_share,
        tie_share=paired.tie_share,
        wilcoxon_p=paired.wilcoxon_p,
    )


def users_table(sets: list[MeasuredSet]) -> pa.Table:
    """Return one row per user and set, with a column per figure; null in a space that the set lacks."""
    tables = []
    for part in sets:
        names = pa.array([part.items.name] * len(part.items.user_id), pa.string())
        figures = {name: figure_U.astype(np.float32) for name, figure_U in part.figures_by_user().items()}
        tables.append(pa.table({"set": names, "user_id": pa.array(part.items.user_id), **figures}))
    return pa.concat_tables(tables, promote_options="default")
