"""Feedback: users rate generated items too. The catalog holds the embeddings of those items, by `item_id`.

ratings of items that are not real -> snapshots, the latest first, by bucket and user -> <root>/rated/

Ratings outlive snapshots, so an embedding stays in <root>/rated/ as long as the catalog exists.
`rebeca catalog gc` leaves that folder alone.
"""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.read import Snapshot, open_snapshot
from rebeca_ray.catalog.snapshots import list_snapshots
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.data.interactions import only_ratings, open_interactions
from rebeca_ray.data.items import EmbeddedItems
from rebeca_ray.data.validation import check_columns
from rebeca_ray.errors import Failure, InputError, StorageError, UserError, describe
from rebeca_ray.identity import GENERATED_ID, bucket_of, hash128, require_key
from rebeca_ray.ray_runtime import for_each
from rebeca_ray.storage.failures import user_error
from rebeca_ray.storage.filesystem import arrow_filesystem, exists, join, list_files, open_filesystem
from rebeca_ray.storage.parquet import PARQUET, ParquetInput, write_table
from rebeca_ray.storage.store import classify, failure_types

log = logging.getLogger(__name__)

ROWS_PER_GROUP = 2_000
ROWS_AT_ONCE = 1_000_000  # of interactions


def with_rated(items: EmbeddedItems, root: str, interactions: InteractionSettings) -> EmbeddedItems:
    """Return the real items, followed by the rated generated items of the catalog at `root`, sorted by id."""
    rated = find_rated(root, interactions, items.item_id, items.image_embeds.shape[1], items.clip)
    if not rated.num_rows:
        return items
    embeds = rated["image_embeds"].combine_chunks().flatten().to_numpy().reshape(rated.num_rows, -1)
    return EmbeddedItems(
        item_id=np.concatenate([items.item_id, rated["item_id"].to_numpy(zero_copy_only=False)]),
        image_embeds=np.concatenate([items.image_embeds, embeds]),
        clip=items.clip,
    )


def find_rated(
    root: str, interactions: InteractionSettings, item_id: np.ndarray, embed_dim: int, clip: str | None
) -> pa.Table:
    """Return the generated items that `interactions` rate, as `schemas.embedded_items`, sorted by id.

    `item_id` are the ids of the real items. The search covers snapshots of the same embedding size and CLIP.
    It looks for an item among the items of the rating user, and among those that all cold-start users share.
    Items in no snapshot are left out of the result, and `build_histories` leaves out their ratings.
    """
    source = open_interactions(interactions)
    rated = ratings_of_others(source, item_id)
    if not rated.num_rows:
        return schemas.embedded_items(embed_dim).empty_table()
    folder = rated_folder(root, clip, embed_dim)
    known = read_known(folder, rated, embed_dim)
    for manifest in reversed(list_snapshots(root)):
        missing = rated.filter(
            pc.invert(pc.is_in(rated["item_id"], value_set=known["item_id"].combine_chunks()))
        )
        if not missing.num_rows:
            break
        of_another_clip = clip and manifest.clip_fingerprint and manifest.clip_fingerprint != clip
        require_key(f"catalog {root}", manifest.user_key_fingerprint, source.user_key)
        if manifest.embed_dim != embed_dim or of_another_clip:
            continue
        try:
            items = find_in(open_snapshot(root, manifest.path), missing)
        except UserError as error:
            why = user_error(error)  # the error of a Ray task has a traceback as its text
            if isinstance(why, StorageError):
                raise
            # A snapshot may be collected after it was listed. Then nothing is damaged.
            if exists(join(root, manifest.path, "manifest.json")):
                log.warning("%s; ratings of its items are left out", why)
            continue
        if items.num_rows:
            name = f"part-{hash128(*items['item_id'].to_pylist())[:16]}.parquet"
            write_table(items, join(folder, name), row_group_size=ROWS_PER_GROUP, embed_column="image_embeds")
            known = pa.concat_tables([known, items])
    return known.sort_by("item_id")


def rated_folder(root: str, clip: str | None, embed_dim: int) -> str:
    """Return the folder of the rated items of a catalog, for one CLIP and size of embeddings."""
    return join(root, "rated", f"{clip or 'clip'}-{embed_dim}")


def ratings_of_others(interactions: ParquetInput, item_id: np.ndarray) -> pa.Table:
    """Return `user_id` and `item_id` of the ratings of generated items, each pair once.

    Only a generated item has an id of 32 hex digits that is not among `item_id`.
    """
    columns = check_columns(interactions, schemas.INTERACTIONS)
    if "event" in columns.names:  # checked as a whole, so that an error tells the number of the row
        only_ratings(interactions.read(pa.schema([columns.field("event")])), interactions.uri)

    needed = pa.schema([field for field in columns if field.name in ("user_id", "item_id", "event")])
    pairs = [pa.schema([field for field in needed if field.name != "event"]).empty_table()]
    for batch in interactions.batches(needed, ROWS_AT_ONCE):
        ratings = only_ratings(batch, interactions.uri)
        generated = pc.match_substring_regex(ratings["item_id"], GENERATED_ID)
        real = pc.is_in(ratings["item_id"], value_set=pa.array(item_id, pa.string()))
        pairs.append(ratings.filter(pc.and_(generated, pc.invert(real))).drop_null())
    return pa.concat_tables(pairs).group_by(["user_id", "item_id"]).aggregate([])


def read_known(folder: str, rated: pa.Table, embed_dim: int) -> pa.Table:
    """Return the rated items that earlier nights wrote to `folder`, each once."""
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
                f"rated items {folder}: cannot be read ({describe(error)}); "
                "check the network and the credentials"
            ) from None
        raise InputError(
            f"rated items {folder}: not readable ({describe(error)}); "
            "restore the damaged file, or remove it: items that a snapshot still holds are found again"
        ) from None


def find_in(snapshot: Snapshot, missing: pa.Table) -> pa.Table:
    """Return the missing items that a snapshot holds, each once, sorted by id.

    The search covers the items of each rating user, and the items of the population user.
    """
    # Users by bucket, and all missing items under the name of the population user.
    missing_id = missing["item_id"].unique()
    owner = pa.scalar(POPULATION_USER, missing.schema.field("user_id").type)
    pool = pa.table({"user_id": pa.repeat(owner, len(missing_id)), "item_id": missing_id})
    pairs = pa.concat_tables([missing.select(pool.column_names), pool])
    users = pairs["user_id"].combine_chunks().dictionary_encode()
    num_buckets = snapshot.manifest.num_buckets
    buckets = (bucket_of(user.as_py(), num_buckets) for user in users.dictionary)
    bucket_of_user = np.fromiter(buckets, int, len(users.dictionary))
    bucket = bucket_of_user[users.indices.to_numpy()]
    order = np.argsort(bucket, kind="stable")
    rows_of_buckets = np.split(order, np.flatnonzero(np.diff(bucket[order])) + 1)

    def find(pairs: pa.Table) -> pa.Table:
        def hits(items: pa.Table) -> pa.Table:
            return items.filter(pc.is_in(pair_of(items), value_set=pair_of(pairs).combine_chunks()))

        # Embeddings are much to read, so first the ids tell which users have a hit.
        names = ["user_id", "item_id"]
        users = pairs["user_id"].unique().to_pylist()
        users_with_hits = hits(snapshot.items(names, users))["user_id"].unique().to_pylist()
        return hits(snapshot.items([*names, "image_embeds"], users_with_hits)).drop_columns(["user_id"])

    values = [pairs.take(rows) for rows in rows_of_buckets]
    return each_once(pa.concat_tables(for_each(find, values, name="rated items"))).sort_by("item_id")


def pair_of(table: pa.Table) -> pa.ChunkedArray:
    """Return user and item of every row as one text."""
    return pc.binary_join_element_wise(table["user_id"], table["item_id"], "\x1f")


def each_once(items: pa.Table) -> pa.Table:
    """Return the first row of each `item_id`, sorted by id."""
    item_id = items["item_id"].combine_chunks()
    return items.take(pc.index_in(item_id.unique().sort(), value_set=item_id))
