"""The quality gate: what was planned is tested before anything is decoded.

Shapes: U users, N planned items of theirs, D embed dim, F factors of the selector.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from rebeca_ray.catalog.layout import Run
from rebeca_ray.checkpoint import TrainedPrior
from rebeca_ray.config import GateSettings
from rebeca_ray.errors import QualityGateError
from rebeca_ray.evaluation.permutation import PermutationTest, permutation_test
from rebeca_ray.storage import open_filesystem

MAX_FILES, MAX_USERS, MAX_ITEMS_A_USER = 20, 2000, 10  # a sample of the plan is enough
MIN_USERS = 20  # fewer tell too little to stop a run


def check_plan(run: Run, prior: TrainedPrior, gate: GateSettings) -> PermutationTest | None:
    """Test whether planned items please their own users more than others, as the selector sees it; None if it cannot tell.

    It catches a prior that ignores its users, or histories that are not theirs; since the selector also chose the items,
    it is no proof of taste. Items of people at large are left out. Raises QualityGateError before anything is rendered.
    """
    test = plan_test(read_sample(run.plan), prior)
    if test and test.num_users >= MIN_USERS and gate.max_p_value is not None and test.p_value > gate.max_p_value:
        raise QualityGateError(
            f"run {run.run_id}: planned items please their own users no more than others: like probability {test.own:.4f}, "
            f"{test.null_mean:.4f} when dealt at random (p = {test.p_value:.4f} with {test.num_users} users; gate.max_p_value is "
            f"{gate.max_p_value:g}). Nothing was rendered or published; look at the prior's metrics and at whose interactions were given"
        )
    return test


def read_sample(plan: str) -> pa.Table:
    """Personal items of at most 2,000 users, from files spread evenly over the plan."""
    filesystem, folder = open_filesystem(plan)
    files = sorted(str(path) for path in filesystem.find(folder) if str(path).endswith(".parquet"))
    files = [files[number] for number in np.unique(np.linspace(0, len(files) - 1, MAX_FILES).astype(int))]
    parts = []
    for path in files:
        with filesystem.open(path, "rb") as file:
            table = pq.read_table(file, columns=["user_id", "rank", "image_embeds", "user_factors", "origin"])
        personal = pc.and_(pc.equal(table["origin"], "new"), pc.is_valid(table["user_factors"]))
        table = table.filter(pc.and_(personal, pc.less(table["rank"], MAX_ITEMS_A_USER)))
        users = pc.unique(table["user_id"])
        if len(users) > (share := MAX_USERS // len(files)):
            users = users.take(np.linspace(0, len(users) - 1, share).astype(int))
        parts.append(table.filter(pc.is_in(table["user_id"], value_set=users)))
    return pa.concat_tables(parts)


def plan_test(sample: pa.Table, prior: TrainedPrior) -> PermutationTest | None:
    """The permutation test of a sample of the plan; None for fewer than two users."""
    users, first, user_N = np.unique(sample["user_id"].to_numpy(zero_copy_only=False), return_index=True, return_inverse=True)
    if prior.selector is None or len(users) < 2:
        return None
    embeds_ND = np.stack(sample["image_embeds"].to_numpy(zero_copy_only=False))
    factor_UF = torch.from_numpy(np.stack(sample["user_factors"].take(first).to_numpy(zero_copy_only=False)))
    like_NU = prior.selector.like_probability_of_all(prior.scaler.scale(torch.from_numpy(embeds_ND)), factor_UF)
    like_UV = torch.zeros(len(users), len(users)).index_add_(0, torch.from_numpy(user_N), like_NU)  # items made for u, to user v
    like_UV /= torch.from_numpy(np.bincount(user_N))[:, None]
    return permutation_test(like_UV.T.numpy())
