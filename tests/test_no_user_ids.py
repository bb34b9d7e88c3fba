"""No user id in a path, a log line or an error: also in the debug log, and where the work of a user fails."""

import logging
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rebeca_ray.catalog.erasure.tombstones import KEY
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.data.interactions import interactions_of
from rebeca_ray.errors import ErrorBudgetExceededError, InputError, UserError
from rebeca_ray.forget import Places, forget
from rebeca_ray.generation.pipeline import generate_catalog
from tests.conftest import NO_GATE, USERS, snapshot_of
from tests.faults.world import Drawn, in_this_process
from tests.generation.test_nights import MONDAY
from tests.generation.test_plan import write_histories, write_history_prior

ODD = "Zqx=1 %7e"  # of a user: recognisable, and hostile to paths


class Everything(frozenset[int]):
    """Holds every seed, so that every row fails."""

    def __contains__(self, seed: object) -> bool:
        return True


@pytest.fixture
def night(config: GenerateConfig, tmp_path: Path) -> GenerateConfig:
    """A night of a user with an odd id, and of others."""
    interactions = write_histories(tmp_path, **{ODD: [(1, 5.0), (2, 1.0)], "user_1": [(3, 4.0)]})
    prior = write_history_prior(tmp_path, "history")
    request({"user_id": [ODD, *USERS[:3]]}, config)
    changes = {"prior": prior, "interactions": interactions, "run_date": MONDAY, "gate": NO_GATE}
    return config.model_copy(update=changes)


def request(columns: dict[str, list[object]], config: GenerateConfig) -> None:
    pq.write_table(pa.table(columns), config.request)


def paths(folder: Path) -> Iterable[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_nights_that_fail_for_a_user_name_the_user_nowhere(
    night: GenerateConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(KEY, "the secret of the tombstones")
    drawn, messages = Drawn(), []
    with caplog.at_level(logging.DEBUG), in_this_process(drawn):
        drawn.refused = Everything()
        with pytest.raises(ErrorBudgetExceededError) as refused:
            snapshot_of(night)
        messages.append(str(refused.value))
        drawn.refused = frozenset(drawn.seeds[:-1])
        later = night.model_copy(update={"run_date": MONDAY.replace(day=3)})
        assert 0 < snapshot_of(later, error_budget=0.99).counts.failed < 12
        errors = read_catalog(night.catalog).table("errors")["user_id"].to_pylist()
        assert ODD in errors
        drawn.refused = frozenset()
        damaged = next(Path(night.catalog, "snapshots/run_date=2026-03-03").rglob("items/**/*.parquet"))
        damaged.write_bytes(b"PAR1 damaged PAR1")
        later = night.model_copy(update={"run_date": MONDAY.replace(day=4)})
        assert snapshot_of(later).counts.published == 12
        request({"user_id": [ODD, ODD]}, night)
        with pytest.raises(InputError, match=r"1 user_ids are repeated \(rows 1\)") as refused:
            generate_catalog(later, in_process=True)
        messages.append(str(refused.value))
        Path(night.catalog, "snapshots/run_date=2026-03-03").rename(tmp_path / "damaged")
        forget(night.catalog, [ODD], Places())
        request({"user_id": [ODD]}, night)
        with pytest.raises(InputError, match="all 1 users were erased") as refused:
            generate_catalog(later, in_process=True)
        messages.append(str(refused.value))
    assert len(caplog.records) > 100
    assert "damaged" in caplog.text
    for text in (caplog.text, *messages, *paths(tmp_path)):
        assert "zqx" not in text.lower()


@pytest.mark.parametrize(
    ("changes", "defect"),
    [
        ({"rating": [9.0, 5.0]}, "1 of 2 rows have a rating outside 1 to 5 (of the items a)"),
        ({"rating": [None, 5.0]}, "a rating that is null, NaN or infinite (of the items a)"),
        ({"item_id": ["a", "a"]}, "a (user_id, item_id) pair seen before (of the items a)"),
        ({"user_id": [f"{ODD}\n", ODD]}, "a control character in user_id (rows 0)"),
        ({"user_id": [ODD * 200, ODD]}, "a user_id of more than 1,000 bytes (rows 0)"),
    ],
)
def test_an_error_of_the_interactions_names_items_and_rows(
    night: GenerateConfig, changes: dict[str, list[object]], defect: str
) -> None:
    assert night.interactions is not None
    values = {"user_id": [ODD, ODD], "item_id": ["a", "b"], "rating": [5.0, 5.0], **changes}
    with pytest.raises(UserError) as refused:
        interactions_of(pa.table(values), night.interactions)
    assert defect in str(refused.value)
    assert "zqx" not in str(refused.value).lower()
