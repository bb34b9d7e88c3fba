"""Share images between the planned items of a bucket, after planning and before rendering.

the plan's files of a bucket -> lenders -> the same items without the borrowed ones, and the borrowed ones in
files of their own, which no shard renders

A borrowed item keeps its user and rank. It gets the id and the embedding of its lender, so both rows of
`items` name one image. Everything of one bucket is in memory, as it is when the bucket is assembled.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.decisions import Decisions, DecisionsFile
from rebeca_ray.generation.item_columns import set_column
from rebeca_ray.generation.parts import SHARED, PartRecord, WriteParts, num_shared, with_busy_seconds
from rebeca_ray.generation.progress import Progress
from rebeca_ray.prior.checkpoint import TrainedPrior, load_prior
from rebeca_ray.prior.sharing import Tastes, find_lenders
from rebeca_ray.ray_runtime import for_each
from rebeca_ray.storage.records import read_recorded

log = logging.getLogger(__name__)

OF_LENDER = ("item_id", "image_embeds", "nearest_item_id", "nearest_similarity")


@dataclass(frozen=True, kw_only=True)
class PlannedBucket:
    """The files of one bucket: its planned items that need an image, and the decisions on its users."""

    parts: list[PartRecord]
    decided: DecisionsFile | None


def share_images(
    context: RunContext,
    decisions: Decisions,
    records: list[PartRecord],
    progress: Progress,
    rows_per_file: int,
) -> list[PartRecord]:
    """Return the records of a plan in which near items of a bucket share an image, if the config says so."""
    if context.config.selection.share_within is None:
        return records
    parts = defaultdict[int, list[PartRecord]](list)
    for record in sorted(records, key=lambda record: record.path):
        if record.shard >= 0:
            parts[record.bucket].append(record)
    decided = {file.bucket: file for file in decisions.to_plan}
    inputs = [PlannedBucket(parts=parts[bucket], decided=decided.get(bucket)) for bucket in sorted(parts)]

    def share(planned: PlannedBucket) -> list[PartRecord]:
        return share_bucket(context, planned, rows_per_file)

    with progress.stage("share"):
        shared = for_each(share, inputs, progress.move, name="share", in_process=context.in_process)
    result = [record for record in records if record.shard < 0]
    result += [record for of_bucket in shared for record in of_bucket]
    saved, planned = num_shared(result), decisions.planned_items
    log.info(f"{saved:,} of {planned:,} images are saved ({saved / max(1, planned):.1%}): users share them")
    return result


def variant_users(context: RunContext, decided: DecisionsFile | None) -> pa.Array:
    """Return the users of a bucket who get variants of a given item: they share nothing."""
    if decided is None:  # the bucket plans the population pool alone
        return pa.array([], pa.string())
    users = read_recorded(context.run.work, decided, ["user_id", "item_id"])
    return users.filter(pc.is_valid(users["item_id"]))["user_id"].combine_chunks()


def share_bucket(context: RunContext, planned: PlannedBucket, rows_per_file: int) -> list[PartRecord]:
    """Write a bucket's plan again with shared images; return its records. Without any, they stay."""
    work, config, parts = context.run.work, context.config, planned.parts
    plan = pa.concat_tables([read_recorded(work, part) for part in parts]).combine_chunks()
    variants = variant_users(context, planned.decided)
    is_variant = pc.is_in(plan["user_id"].combine_chunks(), value_set=variants)
    shareable = pc.and_not(pc.equal(plan["origin"].combine_chunks(), schemas.NEW), is_variant)
    prior = load_prior(config.prior)
    tile, bound = config.sampler.batch_size, config.selection.share_within
    assert bound is not None
    lender_N, like_N = lenders_of(
        plan, np.flatnonzero(shareable.to_numpy(zero_copy_only=False)), prior, bound, tile
    )
    borrows = lender_N != np.arange(plan.num_rows)
    if not borrows.any():
        return parts
    borrowed = plan.filter(pa.array(borrows))
    of_lender = plan.select(OF_LENDER).take(pa.array(lender_N[borrows]))
    for name in OF_LENDER:
        borrowed = set_column(borrowed, name, of_lender[name])
    if like_N is not None:
        borrowed = set_column(borrowed, "like_probability", pa.array(like_N[borrows]))
    borrowed = set_column(borrowed, "shard", pa.array(np.full(borrowed.num_rows, SHARED)))
    write = WriteParts(
        root=work,
        folder="plan",
        by=("shard", "bucket"),
        fencing_token=context.run.fencing_token,
        row_group_size=rows_per_file,
    )
    return [
        PartRecord.from_dict(record)
        for table in (plan.filter(pa.array(~borrows)), borrowed)
        for start in range(0, table.num_rows, rows_per_file)
        for record in write(with_busy_seconds(table.slice(start, rows_per_file), 0.0)).to_pylist()
    ]


def lenders_of(
    plan: pa.Table, shareable: np.ndarray, prior: TrainedPrior, share_within: float, tile: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return for each planned item the row whose image it shows, and its user's like probability for that.

    Only the rows `shareable` share, and only with rows of the same prompts. The order is that of rendering,
    then that of the ids: a lender is never rendered in a later shard than its borrowers.
    """
    lender_N = np.arange(plan.num_rows)
    keys = plan.select(["prompt", "negative_prompt", "shard", "item_id"]).take(pa.array(shareable))
    order = pc.sort_indices(keys, sort_keys=[(name, "ascending") for name in keys.column_names]).to_numpy()
    row_K = shareable[order]
    items = plan.take(pa.array(row_K)).combine_chunks()
    if not len(row_K):
        return lender_N, None
    embeds_KD = items["image_embeds"].combine_chunks().flatten().to_numpy().reshape(len(row_K), -1)
    unit_KD = embeds_KD.astype(np.float64)
    unit_KD /= np.linalg.norm(unit_KD, axis=1, keepdims=True)
    user_K = np.unique(items["user_id"].to_numpy(zero_copy_only=False), return_inverse=True)[1]
    tastes = None
    if not items["user_factors"].null_count:
        user_KF = np.stack(items["user_factors"].to_numpy(zero_copy_only=False))
        tastes = Tastes.of(prior, user_KF, embeds_KD, tile)

    # Items with the same prompts are neighbours now. No image crosses from one group to the next.
    prompts = pc.binary_join_element_wise(items["prompt"], items["negative_prompt"], "\x1f")
    _, start_P = np.unique(prompts.to_numpy(zero_copy_only=False), return_index=True)
    ends = [*sorted(start_P.tolist()), len(row_K)]
    lender_K = np.arange(len(row_K))
    for start, stop in pairwise(ends):
        group = slice(start, stop)
        of_group = tastes and Tastes(user_NF=tastes.user_NF[group], item_NF=tastes.item_NF[group])
        lender_K[group] = start + find_lenders(unit_KD[group], user_K[group], share_within, of_group)
    lender_N[row_K] = row_K[lender_K]
    if tastes is None:
        return lender_N, None
    like_N = np.zeros(plan.num_rows, np.float32)
    like_N[row_K] = tastes.like_of(lender_K)
    return lender_N, like_N
