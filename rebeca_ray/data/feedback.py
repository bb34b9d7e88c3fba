"""Feedback: people rate generated items too, and what they rated is found in the catalog by its `item_id`.

interactions whose item is no real one -> the snapshots that are there, the latest first, by bucket and user -> <root>/rated/

An embedding that was found once is kept in <root>/rated/ for as long as there is a catalog, for ratings outlive snapshots:
`rebeca catalog gc` leaves that folder alone.
"""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.read import Snapshot, open_snapshot
from rebeca_ray.catalog.snapshots import list_snapshots
from rebeca_ray.data.interactions import only_ratings
from rebeca_ray.data.items import EmbeddedItems
from rebeca_ray.data.validation import check_columns, plain
from rebeca_ray.errors import Failure, InputError, StorageError, UserError, describe
from rebeca_ray.identity import GENERATED_ID, bucket_of, hash128
from rebeca_ray.ray_runtime import for_each_bucket
from rebeca_ray.storage.failures import user_error
from rebeca_ray.storage.filesystem import (
    arrow_filesystem,
    exists,
    join,
    list_files,
    open_filesystem,
)
from rebeca_ray.storage.parquet import PARQUET, open_table, write_table
from rebeca_ray.storage.store import classify, failure_types

ROWS_PER_GROUP = 2_000


def with_rated(items: EmbeddedItems, root: str, interactions: str) -> EmbeddedItems:
    """Real items, and after them the generated ones of the catalog at `root` that were rated, in the order of their ids."""
    found = find_rated(root, interactions, items.item_id, items.image_embeds.shape[1], items.clip)
    if not found.num_rows:
        return items
    embeds = found["image_embeds"].combine_chunks().flatten().to_numpy().reshape(found.num_rows, -1)
    return EmbeddedItems(
        item_id=np.concatenate([items.item_id, found["item_id"].to_numpy(zero_copy_only=False).astype(str)]),
        image_embeds=np.concatenate([items.image_embeds, embeds]),
        clip=items.clip,
    )


def find_rated(
    root: str, interactions: str, item_id: np.ndarray, embed_dim: int, clip: str | None
) -> pa.Table:
    """The generated items that `interactions` rate: `schemas.embedded_items`, sorted by id.

    `item_id` are the real items. An item is looked for among those of the user who rated it, and among those that strangers share, in
    snapshots of the same embedding size and CLIP. What is not found anywhere is not in the result; `build_histories` leaves it out.
    """
    rated = ratings_of_others(interactions, item_id)
    if not rated.num_rows:
        return schemas.embedded_items(embed_dim).empty_table()
    folder = join(root, "rated", f"{clip or 'clip'}-{embed_dim}")
    kept = read_kept(folder, rated, embed_dim)
    for manifest in reversed(list_snapshots(root)):
        missing = rated.filter(
            pc.invert(pc.is_in(rated["item_id"], value_set=kept["item_id"].combine_chunks()))
        )
        if not missing.num_rows:
            break
        if manifest.get("embed_dim", embed_dim) != embed_dim or (
            clip and manifest.get("clip") and manifest["clip"] != clip
        ):
            continue
        try:
            found = find_in(open_snapshot(root, manifest["path"]), missing)
        except UserError as error:  # a Ray task's too, whose own text is a traceback
            why = user_error(error)
            if isinstance(why, StorageError):
                raise
            if exists(
                join(root, manifest["path"], "manifest.json")
            ):  # or it was collected since it was listed
                print(f"warning: {why}; ratings of its items are left out", file=sys.stderr)
            continue
        if found.num_rows:
            name = f"part-{hash128(*found['item_id'].to_pylist())[:16]}.parquet"
            write_table(found, join(folder, name), row_group_size=ROWS_PER_GROUP, embed_column="image_embeds")
            kept = pa.concat_tables([kept, found])
    return kept.sort_by("item_id")


def ratings_of_others(interactions: str, item_id: np.ndarray) -> pa.Table:
    """`user_id` and `item_id` of ratings of items that may have been generated and are not among these, each pair once."""
    columns = check_columns(interactions, "interactions", schemas.INTERACTIONS)
    files, _ = open_table(interactions, "interactions")
    filesystem, _ = open_filesystem(interactions)
    item = pc.field("item_id").cast(pa.string())
    wanted = pc.match_substring_regex(item, GENERATED_ID) & ~item.isin(pa.array(item_id, pa.string()))
    try:
        dataset = pyarrow.dataset.dataset(files, filesystem=arrow_filesystem(filesystem), format=PARQUET)
        if "event" in columns:
            only_ratings(
                dataset.to_table(columns=["event"]), interactions
            )  # a strange one is told with its row
        table = dataset.to_table(
            columns=[name for name in columns if name in ("user_id", "item_id", "event")], filter=wanted
        )
    except (pa.ArrowException, *failure_types()) as error:
        raise InputError(
            f"interactions {interactions}: not readable as Parquet ({describe(error)}); write it again"
        ) from None
    table = only_ratings(table, interactions)
    pairs = pa.table({name: plain(table[name]).cast(pa.string()) for name in ("user_id", "item_id")})
    return pairs.drop_null().group_by(["user_id", "item_id"]).aggregate([])


def read_kept(folder: str, rated: pa.Table, embed_dim: int) -> pa.Table:
    """Those of the rated items that were found in earlier nights, each once."""
    filesystem, _ = open_filesystem(folder)
    files = [open_filesystem(file)[1] for file in list_files(folder, ".parquet")]
    try:
        dataset = pyarrow.dataset.dataset(
            files,
            schema=schemas.embedded_items(embed_dim),
            filesystem=arrow_filesystem(filesystem),
            format=PARQUET,
        )
        return each_once(dataset.to_table(filter=pc.field("item_id").isin(rated["item_id"].combine_chunks())))
    except (pa.ArrowException, *failure_types()) as error:
        if classify(error) is not Failure.DAMAGED:
            raise StorageError(
                f"rated items {folder}: cannot be read ({describe(error)}); check the network and the credentials"
            ) from None
        raise InputError(
            f"rated items {folder}: not readable ({describe(error)}); restore what is damaged, or remove it: what a snapshot still has is "
            "found again"
        ) from None


def find_in(snapshot: Snapshot, missing: pa.Table) -> pa.Table:
    """Those of some ratings' items that are in a snapshot, among the items of who rated them and of the pool; each once, sorted by id."""
    num_buckets = snapshot.manifest["num_buckets"]
    users: dict[int, set[str]] = {bucket_of(POPULATION_USER, num_buckets): {POPULATION_USER}}
    for user in missing["user_id"].unique().to_pylist():
        users.setdefault(bucket_of(user, num_buckets), set()).add(user)
    wanted, pairs = missing["item_id"].unique(), pair_of(missing).combine_chunks()
    buckets = sorted(users)

    def hits(items: pa.Table) -> pa.Table:
        of_pool = pc.and_(
            pc.equal(items["user_id"], POPULATION_USER), pc.is_in(items["item_id"], value_set=wanted)
        )
        return items.filter(pc.or_(of_pool, pc.is_in(pair_of(items), value_set=pairs)))

    def find(bucket: int) -> pa.Table:
        names = ["user_id", "item_id"]
        found = hits(snapshot.items(names, sorted(users[bucket])))[
            "user_id"
        ].unique()  # of these alone embeddings, which are much to read
        return hits(snapshot.items([*names, "image_embeds"], found)).drop_columns(["user_id"])

    return each_once(pa.concat_tables(for_each_bucket(find, buckets))).sort_by("item_id")


def pair_of(table: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(table["user_id"], table["item_id"], "\x1f")


def each_once(items: pa.Table) -> pa.Table:
    """Without repetitions of an id."""
    _, first = np.unique(items["item_id"].to_numpy(zero_copy_only=False).astype(str), return_index=True)
    return items.take(pa.array(first))
