"""Planning: users who are drawn tonight become planned items, each with the embedding to draw. One Ray Data graph.

decisions, bucket by bucket -> candidates from the prior -> selector, nearest real item -> the best of them -> work/…/plan

Shapes: G users, N candidates of all of them, D embed dim, U user tokens, H width, F factors of the selector, I items.
"""

import hashlib
import time
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
import torch.nn.functional as F

from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.data.feedback import find_rated
from rebeca_ray.data.histories import Histories, build_histories
from rebeca_ray.data.items import embedded_with, read_image_embeds, read_item_ids
from rebeca_ray.errors import InputError
from rebeca_ray.generation.context import RunContext
from rebeca_ray.generation.dataflow import Actors, Stage, run_graph
from rebeca_ray.generation.decisions import Action, Decision, Decisions
from rebeca_ray.generation.parts import PartRecord, WriteParts, with_busy_seconds
from rebeca_ray.generation.progress import Progress
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.prior.diffusion import Diffusion
from rebeca_ray.prior.sampling import USERS_PADDED_TO, sample_liked
from rebeca_ray.prior.selection import choose, nearest_items
from rebeca_ray.prior.selector import MAX_HISTORY
from rebeca_ray.prior.user_blocks import Rated, UserBlock
from rebeca_ray.storage.filesystem import delete, join, list_files
from rebeca_ray.storage.objects import read_json, write_json
from rebeca_ray.storage.parquet import open_parquet, read_table, write_table

ITEMS_PER_FILE = 20_000
TILES_PER_BATCH = 4  # of the sampler, so that padding costs little
NOT_DRAWN = -1  # the unit of what is judged anew only


def plan_items(
    context: RunContext, histories: Histories | None, decisions: Decisions, progress: Progress
) -> None:
    """Write the run's plan, `shard=<s>/bucket=<b>/`. Every item of a planned user becomes exactly one row.

    A complete plan is never made again: a resumed run reads it. Raises InputError if the prior was replaced meanwhile.
    """
    run, config = context.run, context.config
    if read_json(run.plan_marker):
        return
    delete(run.plan)  # an attempt that died left a part of one
    files = list_files(join(run.work, "decisions", "to-plan"), ".parquet")
    planner = Stage(
        work=PlanUsers,
        arguments=(config, context.versions, histories, context.previous, decisions),
        batch_size=users_per_batch(config),
        actors=Actors(
            count=config.sampler.num_actors,
            cpus=config.sampler.cpus_per_actor,
            gpus=1 if config.sampler.device == "cuda" else 0,
        ),
    )
    writer = WriteParts(
        root=run.work,
        folder="plan",
        by=("shard", "bucket"),
        fencing_token=run.fencing_token,
        row_group_size=ITEMS_PER_FILE,
    )
    records: list[PartRecord] = []
    if files:
        stages = [planner, Stage(work=writer, batch_size=ITEMS_PER_FILE)]
        batches = run_graph(files, stages, in_process=context.in_process)
        records = progress.follow("plan", batches, total=decisions.planned_items)
    write_json({"parts": [asdict(record) for record in records]}, run.plan_marker)


def read_plan(run: Run) -> list[PartRecord]:
    """Return the records of a complete plan."""
    return [PartRecord.from_dict(values) for values in (read_json(run.plan_marker) or {})["parts"]]


def users_per_batch(config: GenerateConfig) -> int:
    return max(
        1,
        TILES_PER_BATCH
        * config.sampler.batch_size
        // (config.num_images * config.selection.candidates_per_item),
    )


def request_histories(config: GenerateConfig, run: Run) -> Histories | None:
    """What the users rated until now, hold-out and all, in parts of the catalog's buckets; None if the config gives no interactions.

    Generated items that were rated are counted on after the real ones.
    """
    if config.interactions is None or config.items is None:
        return None
    everything = config.interactions.model_copy(update={"hold_out": 0.0, "min_likes": 0})
    items = open_parquet(config.items, "items")
    item_id, rated_id, rated = read_item_ids(items), np.array([], str), None
    found = find_rated(config.catalog, config.interactions.path, item_id, *embedded_with(items))
    if found.num_rows:
        rated, rated_id = (
            join(run.work, "rated.parquet"),
            found["item_id"].to_numpy(zero_copy_only=False).astype(str),
        )
        write_table(found, rated, row_group_size=ITEMS_PER_FILE, embed_column="image_embeds")
    histories = build_histories(
        everything, np.concatenate([item_id, rated_id]), run.work, multiple_of=config.layout.num_buckets
    )
    return replace(histories, rated=rated)


@dataclass(frozen=True, kw_only=True)
class Users:
    """What a run knows of some users; tokens and factors have rows of nobodies after theirs."""

    token_GUH: torch.Tensor
    factor_GF: torch.Tensor | None  # the selector's


class PlanUsers:
    """Ray Data actor: one row of `schemas.DECISIONS` in, that user's planned items out.

    Of users who are drawn: candidates from the prior are judged by the selector and compared with the real items; the best
    are kept. Of users who are rescored: last night's items, judged and ranked anew.
    """

    def __init__(
        self,
        config: GenerateConfig,
        versions: dict[str, str],
        histories: Histories | None,
        previous: Snapshot | None,
        decisions: Decisions,
    ) -> None:
        self.config, self.versions, self.histories, self.previous, self.decisions = (
            config,
            versions,
            histories,
            previous,
            decisions,
        )
        self.kept: tuple[int, pa.Table] | None = None
        self.prior = load_prior(config.prior, config.sampler.device)
        if self.prior.fingerprint != versions["prior"]:
            raise InputError(f"prior {config.prior}: was replaced while this run was planning; run again")
        self.diffusion = Diffusion.build(self.prior.diffusion, config.sampler.device)
        self.sampler = config.sampler.resolve(self.prior.sampling, self.prior.diffusion.num_train_timesteps)
        told = self.sampler.identity_json()
        self.settings = hashlib.sha256((told + config.selection.model_dump_json()).encode()).hexdigest()
        self.items = read_image_embeds(config.items) if config.items else None
        self.embeds_ID = (
            None if self.items is None else self.items.image_embeds
        )  # of what may have been rated
        if self.embeds_ID is not None and histories is not None and histories.rated:
            self.embeds_ID = np.concatenate([self.embeds_ID, read_image_embeds(histories.rated).image_embeds])
        self.unit_ID = (
            F.normalize(torch.from_numpy(self.items.image_embeds)).to(config.sampler.device)
            if self.items
            else None
        )
        self.place = (
            {}
            if self.prior.users is None
            else {user: place for place, user in enumerate(self.prior.users["user_id"].to_pylist())}
        )

    @torch.inference_mode()
    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.perf_counter()
        rows = batch.to_pylist()
        planned = self.draw([row for row in rows if row["action"] == Action.PLAN])
        judged = self.rescore([row for row in rows if row["action"] == Action.RESCORE])
        return with_busy_seconds(
            planned_table(planned + judged, self.prior.scaler.embed_dim), time.perf_counter() - started
        )

    def draw(self, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Planned items of users who are drawn."""
        if not asked:
            return []
        users = self.meet(asked)
        keys = [
            identity.plan_key(
                prior=self.versions["prior"],
                settings=self.settings,
                user_id=row["user_id"],
                history_digest=row["history_digest"],
                generation=row["generation"],
            )
            for row in asked
        ]
        wanted = [row["num_images"] for row in asked]
        candidates = [count * self.config.selection.candidates_per_item for count in wanted]
        seeds = [
            identity.candidate_seed(key, number)
            for key, count in zip(keys, candidates, strict=True)
            for number in range(count)
        ]
        row_N = np.repeat(np.arange(len(asked)), candidates)
        padding = (
            -len(row_N) % self.sampler.batch_size
        )  # whole tiles throughout: matrix products of a few rows round otherwise
        row_N, seeds = np.pad(row_N, (0, padding), mode="edge"), seeds + seeds[-1:] * padding
        x_ND = sample_liked(self.prior.network, self.diffusion, users.token_GUH, row_N, seeds, self.sampler)
        like_N, drawn_NF = self.judge(x_ND, users, row_N)
        embeds_ND = half(self.prior.scaler.unscale(x_ND).numpy())
        unit_ND = F.normalize(torch.from_numpy(embeds_ND))
        nearest_N, similarity_N = self.nearest(unit_ND)

        planned: list[dict[str, Any]] = []
        start = 0
        for index, (row, key, count, drawn) in enumerate(zip(asked, keys, wanted, candidates, strict=True)):
            own = slice(start, start + drawn)
            start += drawn
            relevance = np.zeros(drawn, np.float32) if like_N is None else like_N[own]
            copies = similarity_N[own] > self.config.selection.max_item_similarity
            prompt, negative_prompt = row["prompt"], row["negative_prompt"]
            for rank, number in enumerate(
                choose(unit_ND[own].numpy(), relevance, copies, count, self.config.selection.diversity)
            ):
                place = own.start + int(number)
                planned.append(
                    {
                        "item_id": identity.item_id(
                            key, int(number), self.versions["decoder"], prompt, negative_prompt
                        ),
                        "user_id": row["user_id"],
                        "rank": rank,
                        "image_embeds": embeds_ND[place],
                        "like_probability": None if like_N is None else like_N[place],
                        "user_factors": None
                        if users.factor_GF is None
                        else users.factor_GF[index].cpu().numpy(),
                        "drawn_factors": None if drawn_NF is None else drawn_NF[own.start + rank],
                        "nearest_item_id": nearest_N[place],
                        "nearest_similarity": None if nearest_N[place] is None else similarity_N[place],
                        "origin": schemas.POPULATION if row["cold_start"] else schemas.NEW,
                        "bucket": row["bucket"],
                        "shard": self.decisions.shard_of(Decision.from_dict(row)),
                        "prompt": prompt,
                        "negative_prompt": negative_prompt,
                    }
                )
        return planned

    def rescore(self, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Last night's items of some users, with the like probability of tonight's selector, in its order."""
        if not asked or self.previous is None:
            return []
        last = pa.concat_tables([self.last_items(bucket) for bucket in {row["bucket"] for row in asked}])
        place = {row["user_id"]: number for number, row in enumerate(asked)}
        last = last.filter(pc.is_in(last["user_id"], value_set=pa.array(list(place))))
        row_N = np.array([place[user] for user in last["user_id"].to_pylist()])
        embeds_ND = last["image_embeds"].combine_chunks().flatten().to_numpy().reshape(last.num_rows, -1)
        padding = -len(row_N) % self.sampler.batch_size
        x_ND = self.prior.scaler.scale(
            torch.from_numpy(np.pad(embeds_ND, ((0, padding), (0, 0)), mode="edge"))
        )
        like_N, _ = self.judge(x_ND, self.meet(asked), np.pad(row_N, (0, padding), mode="edge"))
        assert like_N is not None  # nobody is rescored without a selector
        told = last.drop_columns(["image_embeds"]).to_pylist()
        planned: list[dict[str, Any]] = []
        ranks = [0] * len(asked)
        for item in np.lexsort((-like_N[: len(row_N)], row_N)):
            row = asked[row_N[item]]
            old = told[item]
            planned.append(
                {
                    **{
                        name: old[name]
                        for name in ("item_id", "user_id", "nearest_item_id", "nearest_similarity")
                    },
                    "rank": ranks[row_N[item]],
                    "image_embeds": embeds_ND[item],
                    "like_probability": like_N[item],
                    "user_factors": None,
                    "drawn_factors": None,
                    "origin": schemas.CARRIED,
                    "bucket": row["bucket"],
                    "shard": NOT_DRAWN,
                    "prompt": row["prompt"],
                    "negative_prompt": row["negative_prompt"],
                }
            )
            ranks[row_N[item]] += 1
        return planned

    def last_items(self, bucket: int) -> pa.Table:
        """Last night's items of a bucket, the latest of which is kept: users come bucket by bucket."""
        if self.kept is None or self.kept[0] != bucket:
            assert self.previous is not None
            self.kept = (bucket, self.previous.bucket("items", bucket, self.config.layout.num_buckets))
        return self.kept[1]

    def meet(self, asked: list[dict[str, Any]]) -> Users:
        """Everything known of the users of some rows of the request."""
        padding = (
            -len(asked) % USERS_PADDED_TO
        )  # nobodies, since matrix products of a few rows round otherwise
        index_G = np.array([self.place.get(row["user_id"], -1) for row in asked] + [-1] * padding)
        rated = self.rated(asked, padding)
        history = None
        if rated is not None and self.embeds_ID is not None:
            history = rated.look_up(self.embeds_ID, self.config.sampler.device)
            history = history._replace(item_BLD=self.prior.scaler.scale(history.item_BLD))
        latest = None if history is None else history.latest(self.prior.settings.max_history)
        selector = self.prior.selector
        factor_GF = None
        if selector is not None and history is not None:
            factor_GF = selector.user_factors(history.latest(MAX_HISTORY))
        elif selector is not None and selector.rows_VF is not None:
            factor_GF = selector.rows_VF[index_G.clip(min=0)] * torch.from_numpy(index_G >= 0)[:, None].to(
                selector.rows_VF.device
            )
        return Users(token_GUH=self.prior.user_tokens(index_G, latest), factor_GF=factor_GF)

    def rated(self, asked: list[dict[str, Any]], padding: int) -> Rated | None:
        """The histories of some rows; empty for who has none."""
        if self.histories is None:
            return None
        found = Rated.nothing(len(asked) + padding, max(self.prior.settings.max_history, MAX_HISTORY))
        for bucket in {row["histories_bucket"] for row in asked}:
            block, place = read_bucket(self.histories.file(bucket))
            rows = [
                number
                for number, row in enumerate(asked)
                if row["histories_bucket"] == bucket and row["user_id"] in place
            ]
            if not rows:
                continue
            places = np.array([place[asked[number]["user_id"]] for number in rows])
            for whole, part in zip(found, block.history(places, found.present_GL.shape[1]), strict=True):
                whole[rows] = part
        return found

    def nearest(self, unit_ND: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The nearest real item of each candidate and its cosine similarity; None and 0 if no items are given."""
        if self.items is None or self.unit_ID is None:
            return np.full(len(unit_ND), None), np.zeros(len(unit_ND), np.float32)
        place_N, similarity_N = nearest_items(unit_ND.to(self.unit_ID.device), self.unit_ID)
        return self.items.item_id[place_N.cpu().numpy()], similarity_N.cpu().numpy()

    def judge(
        self, x_ND: torch.Tensor, users: Users, row_N: np.ndarray
    ) -> tuple[np.ndarray | None, np.ndarray | None]:
        """The like probability of each candidate [N], and what the selector sees in it [N, F+1]; None without selector or ratings."""
        selector = self.prior.selector
        if users.factor_GF is None or selector is None:
            return None, None
        device = users.factor_GF.device
        like_N = selector.like_probability(
            x_ND.to(device), users.factor_GF[torch.from_numpy(row_N).to(device)]
        )
        return like_N.cpu().numpy(), selector.item_factors(x_ND.to(device)).cpu().numpy()


@lru_cache(maxsize=2)
def read_bucket(uri: str) -> tuple[UserBlock, dict[str, int]]:
    """The histories of one bucket, and where each of its users is in it."""
    table = read_table(uri, "histories")
    first = np.zeros(table["bucket"][0].as_py() + 1 if table.num_rows else 1, int)
    return UserBlock(table, first, training_only=False), {
        user: place for place, user in enumerate(table["user_id"].to_pylist())
    }


def half(embeds_ND: np.ndarray) -> np.ndarray:
    """Rounded to half precision, as the catalog keeps them."""
    return embeds_ND.astype(np.float16).astype(np.float32)


def planned_table(rows: list[dict[str, Any]], embed_dim: int) -> pa.Table:
    schema = schemas.plan(embed_dim)
    embeds = np.concatenate([row.pop("image_embeds") for row in rows]) if rows else np.zeros(0, np.float32)
    columns = {name: [row[name] for row in rows] for name in schema.names if name != "image_embeds"}
    columns["image_embeds"] = pa.FixedSizeListArray.from_arrays(
        pa.array(embeds), type=schemas.image_embeds(embed_dim)
    )
    return pa.table(
        [pa.array(columns[name], schema.field(name).type) for name in schema.names], schema=schema
    )
