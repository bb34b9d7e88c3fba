"""Assemble one bucket.

decisions + its part of the plan + its images + the previous snapshot -> its public tables

A bucket without changes is carried over by reference: the previous files are listed again, and joining reads
no embedding or pixel. Everything of one bucket is in memory, of others nothing but the population pool.
"""

from dataclasses import asdict, replace
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray import schemas
from rebeca_ray.catalog.counts import tally
from rebeca_ray.catalog.figures import quality_sums
from rebeca_ray.catalog.images import image_location
from rebeca_ray.catalog.manifest import FileRow
from rebeca_ray.errors import ResumableError
from rebeca_ray.generation.assembly import Assembly, BucketInput, BucketResult, BucketTables, RenderedIndex
from rebeca_ray.generation.compact import compact
from rebeca_ray.generation.decisions import Action, Decision, PublishedUser
from rebeca_ray.generation.item_columns import (
    COMPARED,
    changes_table,
    close_gaps,
    set_column,
    user_and_item,
    without_pool,
)
from rebeca_ray.generation.outcomes import count_carried, count_outcomes
from rebeca_ray.generation.repair.previous import bucket_paths, damaged_numbers, last_users, without_images
from rebeca_ray.storage.filesystem import join
from rebeca_ray.storage.parquet import write_table
from rebeca_ray.storage.records import read_recorded

ITEM_ROW_GROUP = 2000
PLAN_COLUMNS = [
    "item_id", "user_id", "rank", "image_embeds", "like_probability",
    "nearest_item_id", "nearest_similarity", "origin",
]  # fmt: skip
LOCATION = ["user_id", "image_file", "image_row"]


class UnrenderedItemsError(Exception):
    """Planned items have neither image nor error, though time did not run out."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.count = count


class Bucket:
    """One bucket of a run."""

    def __init__(self, work: Assembly, inputs: BucketInput, decisions: list[Decision]) -> None:
        self.work, self.context, self.inputs, self.bucket = work, work.context, inputs, inputs.bucket
        self.decisions = {decision.user_id: decision for decision in decisions}
        self.previous = work.context.previous
        self.last = last_users(self.previous, self.context, self.bucket, work.damaged)

    @classmethod
    def read(cls, work: Assembly, inputs: BucketInput) -> Self:
        """Read the decisions on the users of a bucket. The population pool belongs to one of the buckets.

        Raises DamagedFilesError for a damaged file of decisions.
        """
        rows = read_recorded(work.context.run.work, inputs.decided).to_pylist()
        pool = work.pool_decision
        own_pool = [pool] if pool is not None and pool.bucket == inputs.bucket else []
        return cls(work, inputs, [*map(Decision.from_dict, rows), *own_pool])

    def assemble(self) -> BucketResult:
        """Write the bucket's tables. Every requested item is counted once."""
        return self.carry_by_reference() if self.unchanged() else self.rebuild()

    def unchanged(self) -> bool:
        """Return whether the previous files say exactly what tonight's would.

        `origin` counts too: an item that was new then is carried now.
        """
        previous = self.previous
        if previous is None or previous.num_buckets != self.context.num_buckets:
            return False
        if previous.manifest.schema_version != schemas.SCHEMA_VERSION or len(self.decisions) != len(
            self.last
        ):
            return False
        if bucket_paths(previous, self.context, self.bucket) & self.work.damaged.keys():
            return False
        for user, decision in self.decisions.items():
            last = self.last.get(user)
            if last is None or last.planned_by == previous.run_id or last.stale:
                return False
            if last.planned_on > self.context.date:  # a clock was ahead: the row gets tonight's date
                return False
            if not self.keeps_items(decision, last):
                return False
        return True

    def keeps_items(self, decision: Decision, last: PublishedUser) -> bool:
        """Return whether a user has exactly the items of the previous snapshot."""
        if decision.action is not Action.POOL:
            return decision.action is Action.CARRY
        pool = self.work.pool_decision
        return (
            pool is not None
            and pool.action is Action.CARRY
            and last.cold_start
            and last.num_images == decision.num_images
            and last.settings_digest == decision.settings_digest
        )

    def carry_by_reference(self) -> BucketResult:
        """List the previous files again."""
        assert self.previous is not None
        listed = self.previous.files
        files: list[FileRow] = [
            row
            for row in listed.filter(pc.equal(listed["bucket"], self.bucket)).to_pylist()
            if row["table"] in ("items", "users")
        ]
        items = self.previous.bucket("items", self.bucket, self.context.num_buckets, [*LOCATION, "origin"])
        return BucketResult(
            files=files,
            images=[],
            counts=count_carried(items, self.last, self.decisions.values()),
            sums={},
            live_rows=self.live_rows(items),
            by_reference=True,
        )

    def rebuild(self) -> BucketResult:
        """Join the bucket's items and write its tables."""
        try:
            bucket = self.join()
        except UnrenderedItemsError as error:
            return BucketResult(files=[], images=[], counts={}, sums={}, live_rows={}, unrendered=error.count)
        items, images = bucket.items, list[FileRow]()
        before = None
        if self.previous:
            items, images = compact(self.work, self.bucket, items)
            before = self.previous_items(COMPARED)
        tables = {
            "items": items,
            "users": self.users_table(bucket),
            "errors": bucket.errors,
            "changes": self.with_hidden_departures(changes_table(items, before), items),
        }
        # Some readers stumble over a file without rows.
        files = [self.write(name, table) for name, table in tables.items() if table.num_rows]
        return BucketResult(
            files=files,
            images=images,
            counts=count_outcomes(bucket, self.decisions.values(), self.last, self.work.pool),
            sums=quality_sums(without_pool(items)),
            live_rows=self.live_rows(items),
        )

    def join(self) -> BucketTables:
        """Join new, kept and pooled items: ranks without gaps, sorted by user and rank.

        Raises UnrenderedItemsError for planned items without image and error, unless time ran out,
        ResumableError for a plan with another number of items than were decided on.
        """
        plan = self.read_plan()
        self.check_plan(plan)
        index = RenderedIndex.read(self.context.run.root, self.inputs.files)
        row = pc.index_in(plan["item_id"].combine_chunks(), value_set=index.item_id)

        # Users whose planned items are not all rendered are stale: they keep their previous items.
        to_render = is_among(plan, self.users_with(Action.PLAN))
        unrendered = pc.and_(to_render, pc.is_null(row))
        stale = set(plan["user_id"].filter(unrendered).to_pylist())
        if stale and not self.work.timed_out:
            raise UnrenderedItemsError(pc.sum(unrendered).as_py())
        if self.work.timed_out and (self.work.pool is None or self.work.pool.items.num_rows == 0):
            stale |= self.users_with(Action.POOL)
        finished = pc.and_(to_render, pc.invert(is_among(plan, stale)))
        done, row = plan.filter(finished), row.filter(finished)

        error, fit = index.error.take(row), pc.is_valid(index.width.take(row))
        kept = self.users_with(Action.CARRY) | self.users_with(Action.RESCORE) | (stale & set(self.last))
        pooled = [self.decisions[user] for user in self.decisions if user not in stale]
        tables = [
            self.new_items(done.filter(fit), index, row.filter(fit)),
            self.kept_items(kept, rescored=plan.filter(pc.invert(to_render))),
            self.pooled_items([decision for decision in pooled if decision.action is Action.POOL]),
        ]
        failed = pc.is_valid(error)
        unfit = pc.invert(pc.or_(fit, failed))
        errors = {
            "item_id": done["item_id"].filter(failed),
            "user_id": done["user_id"].filter(failed),
            "stage": pa.repeat("render", pc.sum(failed).as_py() or 0),
            "error": error.filter(failed),
            "attempt": index.attempt.take(row).filter(failed),
        }
        items = pa.concat_tables(tables).sort_by([("user_id", "ascending"), ("rank", "ascending")])
        return BucketTables(
            items=close_gaps(items),
            errors=pa.table(errors, schema=schemas.ERRORS),
            filtered=tally(done["user_id"].filter(unfit)),
            stale=stale,
        )

    def users_with(self, action: Action) -> set[str]:
        return {user for user, decision in self.decisions.items() if decision.action is action}

    def read_plan(self) -> pa.Table:
        """Return the bucket's part of the plan, each item once."""
        if not self.inputs.parts:
            return schemas.plan(self.context.embed_dim).empty_table().select(PLAN_COLUMNS)
        work = self.context.run.work
        return pa.concat_tables([read_recorded(work, part, PLAN_COLUMNS) for part in self.inputs.parts])

    def check_plan(self, plan: pa.Table) -> None:
        """Raise ResumableError unless every user to plan has as many planned items as were decided on."""
        planned = tally(plan["user_id"])
        for user in sorted(self.users_with(Action.PLAN)):
            expected = self.decisions[user].num_images
            if planned.get(user, 0) != expected:
                raise ResumableError(
                    f"run {self.context.run.run_id}: the plan has {planned.get(user, 0)} items of a user, "
                    f"expected {expected}; nothing is published, start it again to resume"
                )

    def with_hidden_departures(self, changes: pa.Table, items: pa.Table) -> pa.Table:
        """Return the changes with users who left and whose items a damaged file hides: without item ids."""
        if not self.work.damaged:
            return changes
        gone = sorted({*self.last} - {*items["user_id"].to_pylist(), *changes["user_id"].to_pylist()})
        columns = {"item_id": [""] * len(gone), "user_id": gone, "change": ["removed"] * len(gone)}
        hidden = pa.table(columns, schema=schemas.CHANGES)
        return pa.concat_tables([changes, hidden]).sort_by(
            [("user_id", "ascending"), ("item_id", "ascending")]
        )

    def previous_items(self, columns: list[str] | None = None) -> pa.Table:
        """Return the previous items of the bucket, without those in damaged files of items."""
        assert self.previous is not None
        num_buckets, damaged = self.context.num_buckets, self.work.damaged
        return self.previous.bucket("items", self.bucket, num_buckets, columns, without=damaged)

    def new_items(self, plan: pa.Table, index: RenderedIndex, row: pa.Array) -> pa.Table:
        """Return planned items that were rendered, with the location of their images."""
        schema = schemas.items(self.context.embed_dim)
        limit = self.context.config.decoder.safety.max_probability
        unsafe = pc.greater(index.safety_probability.take(row), limit)
        columns = {
            "safety_flag": pc.fill_null(unsafe, False),
            "generated_at": pa.repeat(pa.scalar(self.work.now, pa.timestamp("us", tz="UTC")), plan.num_rows),
            "image_file": index.file.take(row),
            "image_row": index.row.take(row),
        }
        names = schema.names
        return pa.table([columns[name] if name in columns else plan[name] for name in names], schema=schema)

    def kept_items(self, users: set[str], *, rescored: pa.Table) -> pa.Table:
        """Return the previous items of some users, at most as many as each requests now.

        Items that were rescored get their new like probabilities and ranks.
        """
        schema = schemas.items(self.context.embed_dim)
        if not users or self.previous is None:
            return schema.empty_table()
        items = self.previous_items()
        items = items.filter(is_among(items, users)).select(schema.names).cast(schema)
        items = without_images(items, damaged_numbers(self.previous, self.work.damaged))
        # By user and item, because users may share an item.
        row = pc.index_in(user_and_item(items), value_set=user_and_item(rescored))
        for name in ("like_probability", "rank"):
            items = set_column(items, name, pc.coalesce(rescored[name].take(row), items[name]))
        was_new = pc.equal(items["origin"], schemas.NEW)
        items = set_column(items, "origin", pc.if_else(was_new, schemas.CARRIED, items["origin"]))
        limits = np.array([self.decisions[user].num_images for user in items["user_id"].to_pylist()], int)
        return items.filter(pa.array(items["rank"].to_numpy() < limits))

    def pooled_items(self, decisions: list[Decision]) -> pa.Table:
        """Return the pool's items under the names of some cold-start users, as many as each wants."""
        pool = self.work.pool
        if not decisions or pool is None:
            return schemas.items(self.context.embed_dim).empty_table()
        counts = [min(decision.num_images, pool.items.num_rows) for decision in decisions]
        items = pool.items.take(pa.array(np.concatenate([np.arange(count) for count in counts])))
        users = np.repeat([decision.user_id for decision in decisions], counts)
        return set_column(items, "user_id", pa.array(users, pa.string()))

    def users_table(self, bucket: BucketTables) -> pa.Table:
        """Return the rows that the next night compares. A stale user keeps the previous row, or has none."""
        num_items, num_failed = tally(bucket.items["user_id"]), tally(bucket.errors["user_id"])
        rows = []
        for user, decision in self.decisions.items():
            last = self.last.get(user)
            if user in bucket.stale:
                if last:
                    # A user who wants more than before is planned again the next night.
                    num_images = min(last.num_images, decision.num_images)
                    num_kept = num_items.get(user, 0)
                    # So is one whose previous items could not all be kept.
                    lost = max(0, min(last.num_items, num_images) - num_kept)
                    rows.append(
                        replace(
                            last,
                            num_images=num_images,
                            num_items=num_kept,
                            num_failed=last.num_failed + lost,
                            stale=True,
                        )
                    )
                continue
            rows.append(self.published_user(decision, last, num_items.get(user, 0), num_failed.get(user, 0)))
        return pa.Table.from_pylist([asdict(row) for row in rows], schema=schemas.USERS).sort_by("user_id")

    def published_user(
        self, decision: Decision, last: PublishedUser | None, num_items: int, num_failed: int
    ) -> PublishedUser:
        """Return the row of a user who is not stale."""
        rescored = decision.action is Action.RESCORE
        kept = last is not None and (rescored or self.keeps_items(decision, last))
        prior = self.context.versions["prior"]
        return PublishedUser(
            user_id=decision.user_id,
            num_images=decision.num_images,
            num_items=num_items,
            num_failed=num_failed,
            cold_start=decision.cold_start,
            stale=False,
            history_digest=decision.history_digest,
            generation=decision.generation,
            prior=last.prior if last and kept and not rescored else prior,
            settings_digest=decision.settings_digest,
            # A clock that was ahead counts as tonight's.
            planned_on=min(last.planned_on, self.context.date) if last and kept else self.context.date,
            planned_by=last.planned_by if last and kept else self.context.run.run_id,
        )

    def live_rows(self, items: pa.Table) -> dict[int, int]:
        """Return how many rows of each image file are in use.

        The pool's rows count in the pool's bucket alone.
        """
        pool = self.work.pool
        location = image_location(items)
        if pool is not None and pool.decision.bucket != self.bucket:
            shared = pc.is_in(location, value_set=image_location(pool.items))
            location = location.filter(pc.invert(shared))
        return tally((pc.unique(location).to_numpy() >> 32).tolist())

    def write(self, name: str, table: pa.Table) -> FileRow:
        path = self.context.run.table(name, self.bucket)
        written = write_table(
            table.replace_schema_metadata(self.work.metadata),
            join(self.context.run.root, path),
            row_group_size=ITEM_ROW_GROUP,
            embed_column="image_embeds" if name == "items" else None,
        )
        ends = pc.min_max(table["user_id"]).as_py()
        return {
            "table": name,
            "bucket": self.bucket,
            "file": self.bucket,
            "path": path,
            **written,
            "min_user_id": ends["min"],
            "max_user_id": ends["max"],
            "live_rows": None,
        }


def is_among(table: pa.Table, users: set[str]) -> pa.Array:
    return pc.is_in(table["user_id"].combine_chunks(), value_set=pa.array(sorted(users), pa.string()))
