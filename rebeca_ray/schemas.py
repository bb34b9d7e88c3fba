"""The Arrow schema of every table, written once.

Embeddings are float32 rounded to half precision, because Spark refuses float16. They are fixed-size lists
without nulls at any level, so that every Parquet reader opens them.
"""

import json

import pyarrow as pa

# The version of the published tables. From 4 on they only grow: see infra/docs/catalog-format.md.
SCHEMA_VERSION = 4
OLDEST_SCHEMA_VERSION = 3  # that this version reads
VERSION_KEY = "rebeca.schema_version"  # in the metadata of every published file
PROVENANCE_KEY = "rebeca.provenance"  # in the metadata of image files: their mark, by default xmp
MARKS = ("none", "xmp", "c2pa")  # of images, the weakest first
PRIOR_KEY, CLIP_KEY = "rebeca.prior", "rebeca.clip"  # in the metadata of sampled embeddings: fingerprints
VERSION_3_NAMES = {
    "cold_start": "stranger",
    "stale": "late",
    "settings_digest": "made_with",
}  # columns of `users`

# The origin of an item: this run, an earlier run, or the population pool.
NEW, CARRIED, POPULATION = "new", "carried", "population"

STRING, BOOL, INT16, INT32, INT64, FLOAT = (
    pa.string(), pa.bool_(), pa.int16(), pa.int32(), pa.int64(), pa.float32(),
)  # fmt: skip
IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", STRING)])  # the Hugging Face convention
OPTIONAL = {"optional": "the column may be missing, its values may not be null"}


def required(name: str, kind: pa.DataType, metadata: dict[str, str] | None = None) -> pa.Field:
    """Return a column without nulls."""
    return pa.field(name, kind, nullable=False, metadata=metadata)


# Inputs.

INTERACTIONS = pa.schema(
    [
        required("user_id", STRING),
        required("item_id", STRING),
        required("rating", FLOAT, metadata=OPTIONAL),  # without the column every row is a like
        pa.field("timestamp", pa.timestamp("us")),
        pa.field("event", STRING),  # "impression" for an item that was only shown; "rating" or null otherwise
    ]
)
EVENTS = ("rating", "impression")

ITEMS = pa.schema([required("item_id", STRING), required("image", IMAGE)])  # to be embedded
CAPTIONS = pa.schema([required("item_id", STRING), required("caption", STRING)])

REQUEST = pa.schema(
    [
        required("user_id", STRING),
        pa.field("num_images", INT32),
        pa.field("prompt", STRING),
        pa.field("negative_prompt", STRING),
        pa.field("priority", FLOAT),  # where time may run out, the greater is rendered earlier
        # Of real items; both or neither. The user gets variants of the item.
        pa.field("item_id", STRING),
        pa.field("strength", FLOAT),  # in (0, 1]: how far the item moves to the user's taste
    ]
)

# Private to a run.

DECISIONS = pa.schema(  # one row per requested user, and one for the population pool
    [
        required("user_id", STRING),
        required("action", STRING),  # plan | carry | rescore | pool
        required("num_images", INT32),
        required("prompt", STRING),
        required("negative_prompt", STRING),
        required("bucket", INT32),  # of the catalog
        required("histories_bucket", INT32),
        required("cold_start", BOOL),
        required("history_digest", STRING),
        required("generation", INT32),
        required("settings_digest", STRING),
        required("priority", FLOAT),
        required("activity", INT32),
        pa.field("item_id", STRING),  # a real item to make variants of
        pa.field("strength", FLOAT),
    ]
)

PRIOR_USERS = pa.schema(
    [
        required("user_id", STRING),
        required("user_index", INT32),
        required("num_likes", INT32),
        required("history_digest", STRING),
    ]
)

GROUPS = pa.schema([required("user_id", STRING), required("group", STRING)])  # of users, to compare

TRAINING, VALIDATION, TEST = 0, 1, 2  # the splits of a user's interactions

HISTORIES = pa.schema(  # one row per user, their interactions in order of time; for training and planning
    [
        required("user_id", STRING),
        required("bucket", INT32),
        required("row", INT32),  # within the bucket; add the bucket's first user_index
        required("num_likes", INT32),
        required("history_digest", STRING),
        required("item_index", pa.list_(INT32)),  # into the embedded items
        required("like", pa.list_(pa.int8())),
        required("timestamp", pa.list_(INT64)),
        required("split", pa.list_(pa.int8())),  # TRAINING, VALIDATION or TEST
    ]
)

# Published.

USERS = pa.schema(  # the inputs of each user's items, which the next night compares
    [
        required("user_id", STRING),
        required("num_images", INT32),  # requested
        required("num_items", INT32),
        required("num_failed", INT32),
        required("cold_start", BOOL),
        required("stale", BOOL),  # time ran out: the user keeps the items of an earlier night
        required("history_digest", STRING),
        required("generation", INT32),
        required("prior", STRING),
        required("settings_digest", STRING),  # of sampler and selection settings, decoder and prompts
        required("planned_on", pa.date32()),
        required("planned_by", STRING),  # a run; not `run_id`, which readers make of the folder's name
    ]
)

ERRORS = pa.schema(
    [
        required("item_id", STRING),
        required("user_id", STRING),
        required("stage", STRING),
        required("error", STRING),
        required("attempt", INT32),
    ]
)

CHANGES = pa.schema(
    [
        required("item_id", STRING),
        required("user_id", STRING),
        required("change", STRING),  # added | removed | updated (another rank, probability or image location)
    ]
)

IMAGES = pa.schema(
    [
        required("item_id", STRING),
        pa.field("image", IMAGE),
        pa.field("thumbnail", pa.binary()),
        pa.field("width", INT32),
        pa.field("height", INT32),
        pa.field("safety_probability", FLOAT),
        required("seed", INT64),
        pa.field("error", STRING),
    ],
    metadata={
        VERSION_KEY: str(SCHEMA_VERSION),
        "huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}),
    },
)

URLS = pa.schema(  # of exported images: each user's items with their URLs, best first
    [
        required("user_id", STRING),
        required("rank", INT16),
        required("item_id", STRING),
        pa.field("like_probability", FLOAT),
        required("origin", STRING),
        required("image_key", STRING),  # below the export's folder
        required("image_url", STRING),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)

FILES = pa.schema(
    [
        required("table", STRING),
        required("bucket", INT32),
        required("file", INT32),  # its number within the table; `items.image_file` refers to it
        required("path", STRING),  # below the catalog's root
        required("rows", INT64),
        required("bytes", INT64),
        required("sha256", STRING),
        pa.field("min_user_id", STRING),
        pa.field("max_user_id", STRING),
        pa.field("live_rows", INT64),  # of an image file: rows that `items` points to
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)


def with_mark(images: pa.Schema, provenance: str) -> pa.Schema:
    """Return the schema of an image file in which all images have at least the mark `provenance`."""
    metadata = {
        key: value for key, value in (images.metadata or {}).items() if key != PROVENANCE_KEY.encode()
    }
    if provenance != "xmp":  # which every file had before there was a choice
        metadata[PROVENANCE_KEY.encode()] = provenance.encode()
    return images.with_metadata(metadata)


def mark_of(images: pa.Schema) -> str:
    """Return the mark that all images of a file have."""
    return (images.metadata or {}).get(PROVENANCE_KEY.encode(), b"xmp").decode()


def image_embeds(embed_dim: int) -> pa.DataType:
    """Return `fixed_size_list<float32>[embed_dim]`, without nulls throughout."""
    return pa.list_(pa.field("element", FLOAT, nullable=False), embed_dim)


def sampled(embed_dim: int, prior: str, clip: str | None) -> pa.Schema:
    """Return the schema of `rebeca sample`: some embeddings per user, best first, made by the prior `prior`.

    `clip` is the fingerprint of the CLIP that the embeddings belong to, if known.
    """
    return pa.schema(
        [
            required("user_id", STRING),
            required("rank", INT16),
            required("seed", pa.uint64()),  # of the noise in the prior
            pa.field("like_probability", FLOAT),
            required("image_embeds", image_embeds(embed_dim)),
        ],
        metadata={PRIOR_KEY: prior, **({} if clip is None else {CLIP_KEY: clip})},
    )


def embedded_items(embed_dim: int) -> pa.Schema:
    """Return the schema of real items as the prior knows them."""
    return pa.schema([required("item_id", STRING), required("image_embeds", image_embeds(embed_dim))])


def plan(embed_dim: int) -> pa.Schema:
    """Return the schema of planned items, private between planning and rendering."""
    return pa.schema(
        [
            required("item_id", STRING),
            required("user_id", STRING),
            required("rank", INT16),
            required("image_embeds", image_embeds(embed_dim)),
            pa.field("like_probability", FLOAT),
            pa.field("user_factors", pa.list_(FLOAT)),  # the selector's, for the quality gate
            # The selector's factors of candidate number `rank`, before any was chosen.
            pa.field("sampled_factors", pa.list_(FLOAT)),
            pa.field("nearest_item_id", STRING),
            pa.field("nearest_similarity", FLOAT),
            required("origin", STRING),  # new | carried (rescored) | population
            required("bucket", INT32),
            required("shard", INT32),  # -1: nothing to render
            required("prompt", STRING),
            required("negative_prompt", STRING),
        ]
    )


def items(embed_dim: int) -> pa.Schema:
    """Return the schema of the published items: one row per item, sorted by `user_id`, `rank`."""
    return pa.schema(
        [
            required("item_id", STRING),
            required("user_id", STRING),
            required("rank", INT16),
            required("image_embeds", image_embeds(embed_dim)),
            pa.field("like_probability", FLOAT),
            pa.field("nearest_item_id", STRING),
            pa.field("nearest_similarity", FLOAT),
            required("safety_flag", BOOL),
            required("origin", STRING),  # new | carried | population
            required("generated_at", pa.timestamp("us", tz="UTC")),
            required("image_file", INT32),
            required("image_row", INT32),
        ]
    )


TABLES = ("items", "images", "users", "errors", "changes")  # of a snapshot


def table(name: str, embed_dim: int, version: int = SCHEMA_VERSION) -> pa.Schema:
    """Return the schema of one of a snapshot's tables, as a version of the format has it."""
    current = {
        "items": items(embed_dim),
        "images": IMAGES,
        "users": USERS,
        "errors": ERRORS,
        "changes": CHANGES,
    }[name]
    if name == "users" and version == 3:
        fields = [field.with_name(VERSION_3_NAMES.get(field.name, field.name)) for field in current]
        return pa.schema(fields, metadata=current.metadata)
    return current


def may_be_missing(field: pa.Field) -> bool:
    """Return whether an input table may lack the column."""
    return bool(field.nullable or field.metadata)
