"""Decode embeddings alone: the second half of a night, for notebooks, and for embeddings of your own.

embeddings of `rebeca sample`, or any others -> the decoder of a config -> images in a file or a table

The rows keep their order and their other columns, but those with the name of an image's column. The noise of
an image follows from the row's `item_id`, or from the embedding where there is none: the same embeddings give
the same images again. Those of a catalog's items, with their prompts, give the catalog's images.
"""

from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.decoder.build import build_decoder, check_decoder
from rebeca_ray.decoder.choices import choose
from rebeca_ray.decoder.files import identify_decoder
from rebeca_ray.decoder.interface import Decoder, Rows
from rebeca_ray.errors import InputError, describe
from rebeca_ray.identity import hash128, image_seed
from rebeca_ray.progress import counting
from rebeca_ray.provenance.signing import load_signer
from rebeca_ray.storage.parquet import ParquetInput, open_parquet, write_tables
from rebeca_ray.storage.writable import require_new_parquet

EMBEDS = "image_embeds"
IMAGES_PER_GROUP = 100
DRAWN = [field for field in schemas.IMAGES if field.name != "item_id"]  # the columns that decoding adds


@dataclass(kw_only=True)
class Decoded:
    """The numbers of rows and of images, and the first error of a row."""

    rows: int = 0
    images: int = 0
    error: str | None = None

    def counted(self, batches: Iterator[pa.Table]) -> Iterator[pa.Table]:
        """Yield all batches, and count their rows."""
        for batch in batches:
            self.rows += batch.num_rows
            self.images += batch.num_rows - batch["image"].null_count
            self.error = self.error or next(iter(batch["error"].drop_null().to_pylist()), None)
            yield batch


def decode_embeddings(embeds: str, decoder: DecoderSettings, out: str) -> Decoded:
    """Write the images of a Parquet file of embeddings to `out`, which appears when it is complete.

    Raises InputError for an output that exists, and for embeddings that the decoder cannot read.
    """
    require_new_parquet(out)
    decoder = choose(decoder)
    source = open_parquet(embeds, "embeddings")
    schema = check_source(source, identify_decoder(decoder).embed_dim, decoder.model)
    check_decoder(decoder)
    renderer = Renderer(decoder)
    kept = [field for field in schema if field.name not in (EMBEDS, *(field.name for field in DRAWN))]
    written = pa.schema(
        [*kept, *DRAWN], metadata=schemas.with_mark(schemas.IMAGES, decoder.provenance).metadata
    )
    decoded = Decoded()
    embeddings = source.batches(schema, decoder.batch_size)
    with closing(renderer.batches(embeddings, source.num_rows)) as batches:
        images = (batch.select(written.names).cast(written) for batch in batches)
        write_tables(decoded.counted(images), written, out, row_group_size=IMAGES_PER_GROUP)
    return decoded


def decode_table(table: pa.Table, decoder: DecoderSettings) -> pa.Table:
    """Return the rows of a table of embeddings with their images, in memory, as `decode_embeddings` does.

    Raises InputError for anything but a table of embeddings that the decoder can read.
    """
    if not isinstance(table, pa.Table):
        raise InputError(
            f"embeddings: are a {type(table).__name__}, expected a pyarrow table with a column {EMBEDS!r}; "
            "give the result of `rebeca_ray.sample`, or make one with pyarrow.table"
        )
    if EMBEDS not in table.column_names:
        raise missing("in memory", table.column_names)
    decoder = choose(decoder)
    rows = range(0, max(1, len(table)), decoder.batch_size)
    embeddings = (table.slice(start, decoder.batch_size) for start in rows)
    with closing(Renderer(decoder).batches(embeddings, len(table))) as batches:
        return pa.concat_tables(batches)


def check_source(source: ParquetInput, embed_dim: int, model: str) -> pa.Schema:
    """Return the columns of the embeddings. Raises InputError without embeddings of the decoder's size."""
    schema = source.headers[0].schema
    if EMBEDS not in schema.names:
        raise missing(source.uri, schema.names)
    kind = schema.field(EMBEDS).type
    size = kind.list_size if pa.types.is_fixed_size_list(kind) else None
    if size is not None and size != embed_dim:
        raise InputError(
            f"embeddings {source.uri}: have size {size}, decoder {model} reads {embed_dim}; "
            "give embeddings of the decoder's CLIP"
        )
    return schema


def missing(name: str, columns: list[str]) -> InputError:
    return InputError(
        f"embeddings {name}: column {EMBEDS!r} is missing, there are {', '.join(columns)}; "
        "give a file of `rebeca sample`, or one with such a column"
    )


class Renderer:
    """The decoder, and the signer if images are signed."""

    def __init__(self, settings: DecoderSettings) -> None:
        self.settings = settings
        identity = identify_decoder(settings)
        self.embed_dim = identity.embed_dim
        self.decoder: Decoder = build_decoder(settings)
        self.signer = load_signer(settings, identity.fingerprint(settings))

    def batches(self, embeddings: Iterator[pa.Table], total: int) -> Generator[pa.Table, None, None]:
        """Yield batches of embeddings with their images.

        The progress among `total` rows shows until the generator is closed.
        """
        with counting("decode", total) as counted:
            yield from counted.tables(self.render(batch) for batch in embeddings)

    def render(self, batch: pa.Table) -> pa.Table:
        """Return rows without their embeddings, and with the columns of `schemas.IMAGES`.

        A null or infinite embedding costs its row alone.
        """
        embeds_BD = matrix_of(batch[EMBEDS], self.embed_dim)
        names = [hash128(embedding.tobytes().hex()) for embedding in embeds_BD]
        if "item_id" in batch.column_names:
            ids = batch["item_id"].to_pylist()
            names = [name if item is None else str(item) for item, name in zip(ids, names, strict=True)]
        prompts, negative = (
            [text or "" for text in batch[name].to_pylist()] if name in batch.column_names else None
            for name in ("prompt", "negative_prompt")
        )
        seeds = [image_seed(name) for name in names]
        outcomes = self.decoder.decode(Rows.of(self.settings, embeds_BD, seeds, prompts, negative))
        encoded = [outcome.image for outcome in outcomes]
        if self.signer:
            encoded = self.signer.sign_all(encoded, names)
        suffix = self.settings.image_format.lower()
        drawn = pa.Table.from_pylist(
            [
                {**asdict(outcome), "image": image and {"bytes": image, "path": f"{name}.{suffix}"}}
                for outcome, image, name in zip(outcomes, encoded, names, strict=True)
            ],
            schema=pa.schema(DRAWN),
        )
        kept = [name for name in batch.column_names if name not in (EMBEDS, *drawn.column_names)]
        images = dict(zip(drawn.column_names, drawn, strict=True))
        return pa.table({**{name: batch[name] for name in kept}, **images})


def matrix_of(column: pa.ChunkedArray, embed_dim: int) -> np.ndarray:
    """Return embeddings as an array [B, D], not a number for a null. Raises InputError for another size."""
    kind = schemas.image_embeds(embed_dim)
    try:
        if column.null_count:
            column = pc.fill_null(column, pa.scalar([float("nan")] * embed_dim, column.type))
        values = column.cast(pa.list_(pa.float32(), embed_dim)).combine_chunks().flatten().to_numpy()
    except pa.ArrowException as error:
        raise InputError(
            f"embeddings: are {column.type}, the decoder reads {kind} ({describe(error)}); "
            "give embeddings of the decoder's CLIP"
        ) from None
    return values.reshape(len(column), embed_dim)
