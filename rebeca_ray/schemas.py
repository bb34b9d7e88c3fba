"""The Arrow schema of every table, written once.

Embeddings are float32 rounded to half precision (Spark refuses float16), fixed-size lists without nulls at any
level, so that every Parquet reader opens them.
"""

import json

import pyarrow as pa

SCHEMA_VERSION = 3  # of what is published. From 3 on it only grows: see infra/catalog-format.md, and the golden files in the tests
OLDEST_SCHEMA_VERSION = 3  # that can be read
VERSION_KEY = "rebeca.schema_version"  # in the metadata of every published file
NEW, CARRIED, POPULATION = (
    "new",
    "carried",
    "population",
)  # where an item comes from: tonight, a night before, the strangers' pool

IMAGE = pa.struct(
    [pa.field("bytes", pa.binary()), pa.field("path", pa.string())]
)  # the Hugging Face convention

OPTIONAL = {
    "optional": "the column may be missing, its values not"
}  # where null is no value, but nobody needs to give one

INTERACTIONS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("rating", pa.float32(), nullable=False, metadata=OPTIONAL),  # without it every row is a like
        pa.field("timestamp", pa.timestamp("us")),
        pa.field(
            "event", pa.string()
        ),  # "impression": was shown, and says nothing; anything rated: "rating", or null
    ]
)
EVENTS = ("rating", "impression")

ITEMS = pa.schema(
    [pa.field("item_id", pa.string(), nullable=False), pa.field("image", IMAGE, nullable=False)]
)  # to be embedded

REQUEST = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("num_images", pa.int32()),
        pa.field("prompt", pa.string()),
        pa.field("negative_prompt", pa.string()),
        pa.field("priority", pa.float32()),  # the greater, the earlier drawn, where time may run out
    ]
)

DECISIONS = pa.schema(  # one row a requested user, and one for the pool of strangers; private to a run
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("decision", pa.string(), nullable=False),  # plan | carry | rescore | pool
        pa.field("num_images", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("negative_prompt", pa.string(), nullable=False),
        pa.field("bucket", pa.int32(), nullable=False),  # of the catalog
        pa.field("histories_bucket", pa.int32(), nullable=False),
        pa.field("stranger", pa.bool_(), nullable=False),
        pa.field("history_digest", pa.string(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("made_with", pa.string(), nullable=False),
        pa.field("priority", pa.float32(), nullable=False),
        pa.field("activity", pa.int32(), nullable=False),
    ]
)

USERS = pa.schema(  # of a snapshot: what a user's items were made from, which the next night compares
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("num_images", pa.int32(), nullable=False),  # requested
        pa.field("num_items", pa.int32(), nullable=False),
        pa.field("num_failed", pa.int32(), nullable=False),
        pa.field("stranger", pa.bool_(), nullable=False),
        pa.field("late", pa.bool_(), nullable=False),  # keeps items of a night before, since time ran out
        pa.field("history_digest", pa.string(), nullable=False),
        pa.field("generation", pa.int32(), nullable=False),
        pa.field("prior", pa.string(), nullable=False),
        pa.field("made_with", pa.string(), nullable=False),  # of the settings, the decoder and the prompts
        pa.field("planned_on", pa.date32(), nullable=False),
        pa.field(
            "planned_by", pa.string(), nullable=False
        ),  # the run; readers make a column `run_id` of the folder's name
    ]
)

PRIOR_USERS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("user_index", pa.int32(), nullable=False),
        pa.field("num_likes", pa.int32(), nullable=False),
        pa.field("history_digest", pa.string(), nullable=False),
    ]
)

HISTORIES = (
    pa.schema(  # one row a user, their interactions in order of time; private to training and planning
        [
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("bucket", pa.int32(), nullable=False),
            # Within the bucket: the user_index is this plus the first user_index of the bucket.
            pa.field("row", pa.int32(), nullable=False),
            pa.field("num_likes", pa.int32(), nullable=False),
            pa.field("history_digest", pa.string(), nullable=False),
            pa.field("item_index", pa.list_(pa.int32()), nullable=False),  # into the embedded items
            pa.field("like", pa.list_(pa.int8()), nullable=False),
            pa.field("timestamp", pa.list_(pa.int64()), nullable=False),
            pa.field("held_out", pa.list_(pa.bool_()), nullable=False),
        ]
    )
)

ERRORS = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("error", pa.string(), nullable=False),
        pa.field("attempt", pa.int32(), nullable=False),
    ]
)

CHANGES = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("user_id", pa.string(), nullable=False),
        pa.field(
            "change", pa.string(), nullable=False
        ),  # added | removed | updated (another rank, probability or image place)
    ]
)

IMAGES = pa.schema(
    [
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("image", IMAGE),
        pa.field("thumbnail", pa.binary()),
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("safety_probability", pa.float32()),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("error", pa.string()),
    ],
    metadata={
        VERSION_KEY: str(SCHEMA_VERSION),
        "huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}}}}),
    },
)

URLS = pa.schema(  # of exported images: who is shown what, the best first
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("rank", pa.int16(), nullable=False),
        pa.field("item_id", pa.string(), nullable=False),
        pa.field("like_probability", pa.float32()),
        pa.field("origin", pa.string(), nullable=False),
        pa.field("image_key", pa.string(), nullable=False),  # below the export's folder
        pa.field("image_url", pa.string(), nullable=False),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)

FILES = pa.schema(
    [
        pa.field("table", pa.string(), nullable=False),
        pa.field("bucket", pa.int32(), nullable=False),
        pa.field(
            "file", pa.int32(), nullable=False
        ),  # the number `items.image_file` points to, within its table
        pa.field("path", pa.string(), nullable=False),  # below the catalog's root
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("min_user_id", pa.string()),
        pa.field("max_user_id", pa.string()),
        pa.field("live_rows", pa.int64()),  # of images: those that `items` points to
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION)},
)


def image_embeds(embed_dim: int) -> pa.DataType:
    """`fixed_size_list<float32>[embed_dim]`, non-null throughout."""
    return pa.list_(pa.field("element", pa.float32(), nullable=False), embed_dim)


def embedded_items(embed_dim: int) -> pa.Schema:
    """Real items as the prior knows them."""
    return pa.schema(
        [
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("image_embeds", image_embeds(embed_dim), nullable=False),
        ]
    )


def plan(embed_dim: int) -> pa.Schema:
    """Planned items of one run: private, between planning and rendering."""
    return pa.schema(
        [
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("rank", pa.int16(), nullable=False),
            pa.field("image_embeds", image_embeds(embed_dim), nullable=False),
            pa.field("like_probability", pa.float32()),
            pa.field(
                "user_factors", pa.list_(pa.float32())
            ),  # the selector's, for the quality gate; and what it sees in
            pa.field(
                "drawn_factors", pa.list_(pa.float32())
            ),  # candidate number `rank`, as drawn: nobody chose it
            pa.field("nearest_item_id", pa.string()),
            pa.field("nearest_similarity", pa.float32()),
            pa.field("origin", pa.string(), nullable=False),  # new | carried (judged anew) | population
            pa.field("bucket", pa.int32(), nullable=False),
            pa.field("unit", pa.int32(), nullable=False),  # -1: nothing to render
            pa.field("prompt", pa.string(), nullable=False),
            pa.field("negative_prompt", pa.string(), nullable=False),
        ]
    )


def items(embed_dim: int) -> pa.Schema:
    """The published table: one row an item, sorted by `user_id`, `rank`."""
    return pa.schema(
        [
            pa.field("item_id", pa.string(), nullable=False),
            pa.field("user_id", pa.string(), nullable=False),
            pa.field("rank", pa.int16(), nullable=False),
            pa.field("image_embeds", image_embeds(embed_dim), nullable=False),
            pa.field("like_probability", pa.float32()),
            pa.field("nearest_item_id", pa.string()),
            pa.field("nearest_similarity", pa.float32()),
            pa.field("safety_flag", pa.bool_(), nullable=False),
            pa.field("origin", pa.string(), nullable=False),  # new | carried | population
            pa.field("generated_at", pa.timestamp("us", tz="UTC"), nullable=False),
            pa.field("image_file", pa.int32(), nullable=False),
            pa.field("image_row", pa.int32(), nullable=False),
        ]
    )


def table(name: str, embed_dim: int) -> pa.Schema:
    """The schema of one of a snapshot's tables."""
    return {
        "items": items(embed_dim),
        "images": IMAGES,
        "users": USERS,
        "errors": ERRORS,
        "changes": CHANGES,
    }[name]


def may_be_missing(field: pa.Field) -> bool:
    """Whether an input table may do without the column."""
    return bool(field.nullable or field.metadata)


def compatible(actual: pa.DataType, expected: pa.DataType) -> bool:
    """Whether a column of `actual` can be read as `expected` without a change of meaning."""
    if pa.types.is_dictionary(actual):
        actual = actual.value_type
    if pa.types.is_string(expected):
        return pa.types.is_string(actual) or pa.types.is_large_string(actual)
    if pa.types.is_integer(expected):
        return pa.types.is_integer(actual)
    if pa.types.is_floating(expected):
        return pa.types.is_floating(actual) or pa.types.is_integer(actual)
    if pa.types.is_struct(expected):  # an image: its bytes are needed, where they came from is not
        place = actual.get_field_index("bytes") if pa.types.is_struct(actual) else -1
        return place >= 0 and (
            pa.types.is_binary(actual[place].type) or pa.types.is_large_binary(actual[place].type)
        )
    if pa.types.is_fixed_size_list(expected):  # an embedding: of what size is known from the rows
        lists = (
            pa.types.is_fixed_size_list(actual) or pa.types.is_list(actual) or pa.types.is_large_list(actual)
        )
        return lists and pa.types.is_floating(actual.value_type)
    return pa.types.is_timestamp(actual) or pa.types.is_date(actual)
