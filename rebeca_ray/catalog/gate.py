"""The quality gate: what was planned is tested before anything is decoded.

Shapes: U users, N drawn candidates of theirs, F factors of the selector.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rebeca_ray.catalog.layout import Run
from rebeca_ray.errors import QualityGateError
from rebeca_ray.evaluation.permutation import PermutationTest, permutation_test
from rebeca_ray.settings import GateSettings
from rebeca_ray.storage import open_filesystem

MAX_FILES, MAX_USERS, MAX_ITEMS_A_USER = 20, 2000, 10  # a sample of the plan is enough
MIN_USERS = 20  # fewer tell too little to stop a run


def check_plan(run: Run, gate: GateSettings) -> PermutationTest | None:
    """Test whether the prior draws what its users like, and not what others like, as the selector sees it.

    Tested are candidates as they were drawn: those that the selector chose would please it whoever they were drawn for. It
    catches a prior that ignores its users; items of people at large are left out. None without a selector or for fewer
    than two users. Raises QualityGateError before anything is rendered.
    """
    test = plan_test(read_sample(run.plan))
    if test and test.num_users >= MIN_USERS and gate.max_p_value is not None and test.p_value > gate.max_p_value:
        raise QualityGateError(
            f"run {run.run_id}: what the prior draws pleases its own users no more than others: like probability {test.own:.4f}, "
            f"{test.null_mean:.4f} when dealt at random (p = {test.p_value:.4f} with {test.num_users} users; gate.max_p_value is "
            f"{gate.max_p_value:g}). Nothing was rendered or published; look at the prior's training.csv, or train it longer"
        )
    return test


def read_sample(plan: str) -> pa.Table:
    """Personal rows of at most 2,000 users, from files spread evenly over the plan."""
    filesystem, folder = open_filesystem(plan)
    files = sorted(str(path) for path in filesystem.find(folder) if str(path).endswith(".parquet"))
    files = [files[number] for number in np.unique(np.linspace(0, len(files) - 1, MAX_FILES).astype(int))]
    parts = []
    for path in files:
        with filesystem.open(path, "rb") as file:
            table = pq.read_table(file, columns=["user_id", "rank", "user_factors", "drawn_factors", "origin"])
        personal = pc.and_(pc.equal(table["origin"], "new"), pc.is_valid(table["user_factors"]))
        table = table.filter(pc.and_(personal, pc.less(table["rank"], MAX_ITEMS_A_USER)))
        users = pc.unique(table["user_id"])
        if len(users) > (share := MAX_USERS // len(files)):
            users = users.take(np.linspace(0, len(users) - 1, share).astype(int))
        parts.append(table.filter(pc.is_in(table["user_id"], value_set=users)))
    return pa.concat_tables(parts)


def plan_test(sample: pa.Table) -> PermutationTest | None:
    """The permutation test of a sample of the plan; None for fewer than two users."""
    users, first, user_N = np.unique(sample["user_id"].to_numpy(zero_copy_only=False), return_index=True, return_inverse=True)
    if len(users) < 2:
        return None
    user_UF = np.stack(sample["user_factors"].take(first).to_numpy(zero_copy_only=False))
    drawn_NF = np.stack(sample["drawn_factors"].to_numpy(zero_copy_only=False))
    like_UN = 1 / (1 + np.exp(-(user_UF[:, :-1] @ drawn_NF[:, :-1].T + user_UF[:, -1:] + drawn_NF[:, -1])))
    order = np.argsort(user_N, kind="stable")
    counts = np.bincount(user_N)
    return permutation_test(np.add.reduceat(like_UN[:, order], np.cumsum(counts) - counts, axis=1) / counts)
