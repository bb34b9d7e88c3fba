"""The quality gate: test the plan before rendering, and the snapshot before publishing.

Shapes: U users, N candidates of theirs, F factors of the selector.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rebeca_ray.catalog.layout import Run
from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.config.sections import GateSettings
from rebeca_ray.evaluation.permutation import PermutationTest, permutation_test
from rebeca_ray.generation.plan import read_plan
from rebeca_ray.storage.records import read_columns

MAX_FILES, MAX_USERS, MAX_ITEMS_PER_USER = 20, 2000, 10  # a sample of the plan is enough
NO_BOUNDS = {"max_p_value", "max_drop", "max_rise", "min_sample"}  # they bound no figure of a snapshot
COLUMNS = ["user_id", "rank", "user_factors", "sampled_factors", "origin"]
MIN_USERS = 20  # with fewer, the test stops no run


def check_plan(run: Run, gate: GateSettings) -> tuple[PermutationTest | None, str | None]:
    """Test whether the prior's candidates please their own users, as the selector sees it.

    Returns the test, and the reason to stop the run if they do not. The test looks at candidates before any
    was chosen: chosen candidates would please the selector whoever they were sampled for. Items of the
    population pool are left out. Without a selector, or for fewer than two users, there is no test.
    """
    test = plan_test(read_sample(run))
    if (
        test is None
        or test.num_users < MIN_USERS
        or gate.max_p_value is None
        or test.p_value <= gate.max_p_value
    ):
        return test, None
    return test, (
        f"run {run.run_id}: what the prior draws pleases its own users no more than others: "
        f"like probability {test.matched_mean:.4f}, {test.null_mean:.4f} when shuffled between users "
        f"(p = {test.p_value:.4f} with {test.num_users} users; gate.max_p_value is {gate.max_p_value:g})"
    )


def refusals(manifest: Manifest, before: Manifest | None, gate: GateSettings) -> list[str]:
    """Return the reasons against publishing a snapshot, by itself and against the one before.

    Each reason tells the figure and its distance from the bound. Figures of fewer than `gate.min_sample`
    items refuse nothing.
    """
    now, last = judged(manifest, gate), judged(before, gate) if before else {}
    reasons = []
    for name, bound in bounds(gate, "min_").items():
        value, former = now[name], last.get(name)
        if value is None:
            continue
        if bound is not None and value < bound:
            reasons.append(f"{name} is {value:g}, {bound - value:.4g} below gate.min_{name} {bound:g}")
        if former and gate.max_drop is not None and value < (1 - gate.max_drop) * former:
            drop = 1 - value / former
            reasons.append(
                f"{name} is {value:g}, {drop:.1%} below the previous snapshot's {former:g} "
                f"(gate.max_drop is {gate.max_drop:.1%})"
            )
    for name, bound in bounds(gate, "max_").items():
        value, former = now[name], last.get(name)
        if value is None:
            continue
        if bound is not None and value > bound:
            reasons.append(f"{name} is {value:.2%}, {value - bound:.2%} above gate.max_{name} {bound:.2%}")
        if former is not None and gate.max_rise is not None and value > former + gate.max_rise:
            reasons.append(
                f"{name} is {value:.2%}, {value - former:.2%} above the previous snapshot's {former:.2%} "
                f"(gate.max_rise is {gate.max_rise:.2%})"
            )
    return reasons


def bounds(gate: GateSettings, prefix: str) -> dict[str, float | None]:
    """Return the lower or upper bounds of a config, by the figure they bound."""
    names = [name for name in GateSettings.model_fields if name.startswith(prefix) and name not in NO_BOUNDS]
    return {name.removeprefix(prefix): getattr(gate, name) for name in names}


def judged(manifest: Manifest, gate: GateSettings) -> dict[str, float | None]:
    """Return the figures that the gate bounds; None for one that is unknown, or of too few items."""
    counts, figures, permutation = manifest.counts, manifest.figures, manifest.quality.permutation
    enough = figures.judged_items >= gate.min_sample
    means = figures.model_dump(exclude={"failed", "filtered", "judged_items"})
    return {
        "users": counts.users,
        "items": counts.published,
        "effect": permutation.effect if permutation and permutation.users >= MIN_USERS else None,
        "failed": figures.failed,
        "filtered": figures.filtered if counts.requested >= gate.min_sample else None,
        **{name: value if enough else None for name, value in means.items()},
    }


def read_sample(run: Run) -> pa.Table:
    """Personal rows of at most 2,000 users, from files spread evenly over the plan."""
    files = sorted(part.path for part in read_plan(run))
    if not files:
        return pa.table({"user_id": pa.array([], pa.string())})
    files = [files[number] for number in np.unique(np.linspace(0, len(files) - 1, MAX_FILES).astype(int))]
    parts = []
    for path in files:
        table = read_columns(run.work, path, COLUMNS)
        personal = pc.and_(pc.equal(table["origin"], "new"), pc.is_valid(table["user_factors"]))
        table = table.filter(pc.and_(personal, pc.less(table["rank"], MAX_ITEMS_PER_USER)))
        users = pc.unique(table["user_id"])
        if len(users) > (share := MAX_USERS // len(files)):
            users = users.take(np.linspace(0, len(users) - 1, share).astype(int))
        parts.append(table.filter(pc.is_in(table["user_id"], value_set=users)))
    return pa.concat_tables(parts)


def plan_test(sample: pa.Table) -> PermutationTest | None:
    """The permutation test of a sample of the plan; None for fewer than two users."""
    users, first, user_N = np.unique(
        sample["user_id"].to_numpy(zero_copy_only=False), return_index=True, return_inverse=True
    )
    if len(users) < 2:
        return None
    user_UF = np.stack(sample["user_factors"].take(first).to_numpy(zero_copy_only=False))
    drawn_NF = np.stack(sample["sampled_factors"].to_numpy(zero_copy_only=False))
    like_UN = 1 / (1 + np.exp(-(user_UF[:, :-1] @ drawn_NF[:, :-1].T + user_UF[:, -1:] + drawn_NF[:, -1])))
    order = np.argsort(user_N, kind="stable")
    counts = np.bincount(user_N)
    return permutation_test(np.add.reduceat(like_UN[:, order], np.cumsum(counts) - counts, axis=1) / counts)
