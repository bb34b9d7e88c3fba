"""Assembling one bucket: its decisions, its part of the plan, its images and last night's items become its public tables.

A bucket in which nothing changed is carried over by reference: last night's files are listed again, and no embedding, no pixel is
read. Everything of a bucket is held in memory, of others nothing but the strangers' pool.
"""

from datetime import date
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.counts import KINDS, tally
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.generation.assembly import Assembled, Assembly, Together
from rebeca_ray.generation.compact import compact
from rebeca_ray.generation.decide import CARRY, PLAN, POOLED, RESCORE
from rebeca_ray.generation.rendered import Drawn
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import read_table, write_table

ITEM_ROW_GROUP = 2000
PLAN_COLUMNS = [
    "item_id", "user_id", "rank", "image_embeds", "like_probability", "nearest_item_id", "nearest_similarity", "origin",
]  # fmt: skip
COMPARED = ["item_id", "user_id", "rank", "like_probability", "image_file", "image_row"]


class Bucket:
    """One bucket of a run."""

    def __init__(self, work: Assembly, bucket: int, decisions: list[dict[str, Any]]) -> None:
        self.work, self.bucket, self.decisions = work, bucket, decisions
        self.decided = {row["user_id"]: row for row in decisions}
        last = work.previous.bucket("users", bucket, work.num_buckets) if work.previous else None
        self.last = {row["user_id"]: row for row in last.to_pylist()} if last else {}

    @classmethod
    def read(cls, work: Assembly, bucket: int) -> Self:
        """With all that was decided of its users."""
        decisions = read_table(work.run.decisions(bucket), "decisions").to_pylist()
        pool = [work.pool] if work.pool is not None and work.pool["bucket"] == bucket else []
        return cls(work, bucket, decisions + pool)

    def assemble(self) -> Assembled:
        """Write the bucket's tables; every item that was requested is counted once."""
        return self.by_reference() if self.unchanged() else self.anew()

    def unchanged(self) -> bool:
        """Whether last night's files say what tonight's would, `origin` too: what was new then is carried now."""
        work, previous = self.work, self.work.previous
        if (
            previous is None
            or previous.manifest["num_buckets"] != work.num_buckets
            or len(self.decisions) != len(self.last)
        ):
            return False
        for row in self.decisions:
            last = self.last.get(row["user_id"])
            if (
                last is None
                or last["planned_by"] == previous.manifest["run_id"]
                or last["late"]
                or not self.keeps(row, last)
            ):
                return False
        return True

    def keeps(self, row: dict[str, Any], last: dict[str, Any]) -> bool:
        """Whether a user has the very items of last night."""
        if row["decision"] == POOLED:
            kept = self.work.pool is not None and self.work.pool["decision"] == CARRY
            return bool(
                kept
                and last["stranger"]
                and last["num_images"] == row["num_images"]
                and last["made_with"] == row["made_with"]
            )
        return bool(row["decision"] == CARRY)

    def by_reference(self) -> Assembled:
        """List last night's files again."""
        assert self.work.previous is not None
        files = [
            row
            for row in self.work.previous.files.to_pylist()
            if row["bucket"] == self.bucket and row["table"] in ("items", "users")
        ]
        counts = dict.fromkeys((*KINDS, "users", "late_users"), 0)
        for user, row in self.last.items():
            if user != POPULATION_USER:
                counts["population" if row["stranger"] else "carried"] += row["num_items"]
                counts["filtered"] += row["num_images"] - row["num_items"]
                counts["users"] += row["num_items"] > 0
        items = self.work.previous.bucket(
            "items", self.bucket, self.work.num_buckets, ["user_id", "image_file", "image_row"]
        )
        return Assembled(
            files=files, images=[], counts=counts, sums={}, live=self.live_rows(items), by_reference=True
        )

    def anew(self) -> Assembled:
        """Put the bucket's items together and write them."""
        work = self.work
        found = self.put_together()
        if found.undrawn:
            return Assembled(files=[], images=[], counts={}, sums={}, live={}, undrawn=found.undrawn)
        items, images = compact(work, self.bucket, found.items) if work.previous else (found.items, [])
        before = (
            work.previous.bucket("items", self.bucket, work.num_buckets, COMPARED) if work.previous else None
        )
        tables = {
            "items": items,
            "users": self.users_table(found),
            "errors": found.errors,
            "changes": changes_table(items, before),
        }
        files = [
            self.write(name, table) for name, table in tables.items() if table.num_rows
        ]  # some readers stumble over empty files
        return Assembled(
            files=files,
            images=images,
            counts=self.count(found),
            sums=quality_sums(items),
            live=self.live_rows(items),
        )

    def put_together(self) -> Together:
        """Everybody's items: those drawn tonight, those kept, those of the pool; ranks without gaps, sorted by user and rank."""
        plan = self.read_plan()
        drawn = Drawn.read(
            self.work.run.root, [file for file in self.work.files if file["bucket"] == self.bucket]
        )
        place = pc.index_in(plan["item_id"].combine_chunks(), value_set=drawn.item_id)
        chosen = is_among(plan, {user for user, row in self.decided.items() if row["decision"] == PLAN})
        undrawn = pc.and_(chosen, pc.is_null(place))
        late = set(plan["user_id"].filter(undrawn).to_pylist())
        if late and not self.work.late:
            return Together(items=plan, errors=plan, late=late, undrawn=pc.sum(undrawn).as_py())
        if self.work.pool_items is None or self.work.pool_items.num_rows == 0:
            late |= {
                user for user, row in self.decided.items() if row["decision"] == POOLED and self.work.late
            }
        finished = pc.and_(chosen, pc.invert(is_among(plan, late)))
        done, place = plan.filter(finished), place.filter(finished)
        error, fit = drawn.error.take(place), pc.is_valid(drawn.width.take(place))
        failed = pc.is_valid(error)
        kept = {user for user, row in self.decided.items() if row["decision"] in (CARRY, RESCORE)} | (
            late & set(self.last)
        )
        tables = [
            self.new_items(done.filter(fit), drawn, place.filter(fit)),
            self.kept_items(kept, judged=plan.filter(pc.invert(chosen))),
            self.pooled_items(
                [row for user, row in self.decided.items() if row["decision"] == POOLED and user not in late]
            ),
        ]
        errors = {
            "item_id": done["item_id"].filter(failed),
            "user_id": done["user_id"].filter(failed),
            "stage": pa.repeat("render", pc.sum(failed).as_py() or 0),
            "error": error.filter(failed),
            "attempt": drawn.attempt.take(place).filter(failed),
        }
        return Together(
            items=close_gaps(
                pa.concat_tables(tables).sort_by([("user_id", "ascending"), ("rank", "ascending")])
            ),
            errors=pa.table(errors, schema=schemas.ERRORS),
            late=late,
        )

    def read_plan(self) -> pa.Table:
        """The bucket's part of the plan, each item once."""
        paths = [
            join(self.work.run.work, part["path"])
            for part in self.work.parts
            if part["bucket"] == self.bucket
        ]
        tables = [read_table(path, "plan", PLAN_COLUMNS) for path in paths]
        if not tables:
            return pa.table(
                [pa.array([], schemas.plan(self.work.embed_dim).field(name).type) for name in PLAN_COLUMNS],
                names=PLAN_COLUMNS,
            )
        return pa.concat_tables(tables)

    def new_items(self, plan: pa.Table, drawn: Drawn, place: pa.Array) -> pa.Table:
        schema = schemas.items(self.work.embed_dim)
        unsafe = pc.greater(drawn.safety_probability.take(place), self.work.max_safety_probability)
        columns = {
            "safety_flag": pc.fill_null(unsafe, False),
            "generated_at": pa.repeat(pa.scalar(self.work.now, pa.timestamp("us", tz="UTC")), plan.num_rows),
            "image_file": drawn.file.take(place),
            "image_row": drawn.row.take(place),
        }
        return pa.table(
            [columns[name] if name in columns else plan[name] for name in schema.names], schema=schema
        )

    def kept_items(self, users: set[str], *, judged: pa.Table) -> pa.Table:
        """Last night's items of some users, `judged` anew or as they were, and no more of them than are wanted."""
        schema = schemas.items(self.work.embed_dim)
        if not users or self.work.previous is None:
            return schema.empty_table()
        last = self.work.previous.bucket("items", self.bucket, self.work.num_buckets)
        last = last.filter(is_among(last, users)).select(schema.names).cast(schema)
        place = pc.index_in(last["item_id"], value_set=judged["item_id"].combine_chunks())
        for name in ("like_probability", "rank"):
            last = set_column(last, name, pc.coalesce(judged[name].take(place.combine_chunks()), last[name]))
        last = set_column(
            last, "origin", pc.if_else(pc.equal(last["origin"], schemas.NEW), schemas.CARRIED, last["origin"])
        )
        wanted = np.array([self.decided[user]["num_images"] for user in last["user_id"].to_pylist()], int)
        return last.filter(pa.array(last["rank"].to_numpy() < wanted))

    def pooled_items(self, strangers: list[dict[str, Any]]) -> pa.Table:
        """The pool's items under the names of some strangers, as many as each wants."""
        schema = schemas.items(self.work.embed_dim)
        pool = self.work.pool_items
        if not strangers or pool is None:
            return schema.empty_table()
        counts = [min(row["num_images"], pool.num_rows) for row in strangers]
        items = pool.take(pa.array(np.concatenate([np.arange(count) for count in counts])))
        return set_column(
            items, "user_id", pa.array(np.repeat([row["user_id"] for row in strangers], counts), pa.string())
        )

    def users_table(self, found: Together) -> pa.Table:
        """What the next night compares: of users who are late last night's row, of those who never had items none."""
        num_items, num_failed = tally(found.items["user_id"]), tally(found.errors["user_id"])
        rows = []
        for user, row in self.decided.items():
            last = self.last.get(user)
            if user in found.late:
                wanted = (
                    min(last["num_images"], row["num_images"]) if last else 0
                )  # who wants more again is drawn
                rows += (
                    [{**last, "num_images": wanted, "num_items": num_items.get(user, 0), "late": True}]
                    if last
                    else []
                )
                continue
            kept = last is not None and (row["decision"] == RESCORE or self.keeps(row, last))
            made = (
                {name: last[name] for name in ("planned_on", "planned_by", "prior")}
                if kept and last
                else self.made_tonight()
            )
            judged = {"prior": self.work.prior} if row["decision"] == RESCORE else {}
            told = {
                name: row[name]
                for name in ("user_id", "num_images", "stranger", "history_digest", "generation", "made_with")
            }
            counted = {
                "num_items": num_items.get(user, 0),
                "num_failed": num_failed.get(user, 0),
                "late": False,
            }
            rows.append({**told, **counted, **made, **judged})
        return pa.Table.from_pylist(rows, schema=schemas.USERS).sort_by("user_id")

    def made_tonight(self) -> dict[str, Any]:
        return {
            "planned_on": date.fromisoformat(self.work.run.run_date),
            "planned_by": self.work.run.run_id,
            "prior": self.work.prior,
        }

    def count(self, found: Together) -> dict[str, int]:
        """Every requested item as one of KINDS; the pool itself is requested by nobody."""
        asked = found.items.filter(pc.not_equal(found.items["user_id"], POPULATION_USER))
        origins = tally(asked["origin"])
        num_items, num_failed = tally(asked["user_id"]), tally(found.errors["user_id"])
        counts = {kind: origins.get(kind, 0) for kind in KINDS[:3]} | {
            "failed": 0,
            "filtered": 0,
            "deferred": 0,
        }
        for user, row in self.decided.items():
            missing = row["num_images"] - num_items.get(user, 0) if user != POPULATION_USER else 0
            failed = min(
                missing, self.work.pool_failed if row["decision"] == POOLED else num_failed.get(user, 0)
            )
            counts["failed"] += failed
            late = user in found.late or (row["decision"] == POOLED and self.work.pool_late)
            counts["deferred" if late else "filtered"] += missing - failed
        return {**counts, "users": len(num_items), "late_users": len(found.late - {POPULATION_USER})}

    def live_rows(self, items: pa.Table) -> dict[int, int]:
        """How many rows of each image file are pointed to; the pool's by the pool alone."""
        pool = self.work.pool_items
        if pool is not None and not (self.work.pool and self.work.pool["bucket"] == self.bucket):
            items = items.filter(pc.invert(pc.is_in(place_of(items), value_set=place_of(pool))))
        return tally((pc.unique(place_of(items)).to_numpy() >> 32).tolist())

    def write(self, name: str, table: pa.Table) -> dict[str, Any]:
        path = self.work.run.table(name, self.bucket)
        table = table.replace_schema_metadata(self.work.metadata)
        embed_column = "image_embeds" if name == "items" else None
        written = write_table(
            table, join(self.work.run.root, path), row_group_size=ITEM_ROW_GROUP, embed_column=embed_column
        )
        ends = pc.min_max(table["user_id"]).as_py()
        told = {"min_user_id": ends["min"], "max_user_id": ends["max"], "live_rows": None}
        return {"table": name, "bucket": self.bucket, "file": self.bucket, "path": path, **written, **told}


def is_among(table: pa.Table, users: set[str]) -> pa.Array:
    return pc.is_in(table["user_id"].combine_chunks(), value_set=pa.array(sorted(users), pa.string()))


def place_of(items: pa.Table) -> pa.Array:
    """Where each item's image is, as one number: file, then row."""
    return pa.array((items["image_file"].to_numpy().astype(np.int64) << 32) + items["image_row"].to_numpy())


def set_column(table: pa.Table, name: str, values: Any) -> pa.Table:
    return table.set_column(
        table.schema.get_field_index(name),
        table.schema.field(name),
        values.cast(table.schema.field(name).type),
    )


def close_gaps(items: pa.Table) -> pa.Table:
    """Sorted items with ranks 0, 1, 2, … for every user."""
    users = items["user_id"].to_numpy(zero_copy_only=False)
    first = (
        np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]])) if len(users) else np.array([], int)
    )
    rank = np.arange(len(users)) - np.repeat(first, np.diff([*first, len(users)]))
    return set_column(items, "rank", pa.array(rank, pa.int16()))


def quality_sums(items: pa.Table) -> dict[str, float]:
    """Sums over a bucket's items, of which the quality gate makes means."""
    asked = items.filter(pc.not_equal(items["user_id"], POPULATION_USER))
    if asked.num_rows == 0:
        return {}
    embeds = asked["image_embeds"].combine_chunks().flatten().to_numpy().reshape(asked.num_rows, -1)
    unit = embeds / np.linalg.norm(embeds, axis=1, keepdims=True)
    users = asked["user_id"].to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.concatenate([[True], users[1:] != users[:-1]]))
    counts = np.diff([*starts, len(users)])
    alike = np.square(np.add.reduceat(unit, starts, axis=0)).sum(
        1
    )  # of n unit vectors: n + the sum of their cosines
    several = counts > 1
    cosine = (alike[several] - counts[several]) / (counts[several] * (counts[several] - 1))
    # Equal rows have equal products with any vector, and others hardly ever: much less work than comparing rows.
    product = embeds @ np.random.default_rng(0).standard_normal(embeds.shape[1])
    owner = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((product, owner))
    same = int(((np.diff(product[order]) == 0) & (np.diff(owner[order]) == 0)).sum())
    like = asked["like_probability"].drop_null()
    return {
        "items": float(asked.num_rows),
        "duplicates": float(same),
        "like": float(pc.sum(like).as_py() or 0.0),
        "judged": float(len(like)),
        "distance": float((1 - cosine).sum()),
        "users_with_several": float(several.sum()),
    }


def changes_table(items: pa.Table, before: pa.Table | None) -> pa.Table:
    """What differs from the snapshot before, user by user: items that came, that went, and that stayed but are told differently."""
    now = items.select(COMPARED)
    before = now.slice(0, 0) if before is None else before.select(COMPARED)
    names, names_before = (
        pc.binary_join_element_wise(part["user_id"], part["item_id"], "\x1f").combine_chunks()
        for part in (now, before)
    )
    place = pc.index_in(names, value_set=names_before)
    stayed, was = now.filter(pc.is_valid(place)), before.take(place.drop_null())
    same = np.ones(stayed.num_rows, bool)
    for name in COMPARED[2:]:
        same &= stayed[name].fill_null(-1).to_numpy() == was[name].fill_null(-1).to_numpy()
    parts = {
        "added": now.filter(pc.is_null(place)),
        "removed": before.filter(pc.invert(pc.is_in(names_before, value_set=names))),
        "updated": stayed.filter(pa.array(~same)),
    }
    tables = [
        pa.table([part["item_id"], part["user_id"], pa.repeat(change, part.num_rows)], schema=schemas.CHANGES)
        for change, part in parts.items()
    ]
    return pa.concat_tables(tables).sort_by([("user_id", "ascending"), ("item_id", "ascending")])
