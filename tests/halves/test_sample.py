"""`rebeca sample`: the embeddings that planning would choose, in one file that appears when complete."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

import rebeca_ray as rr
from rebeca_ray import identity, schemas
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.cli.commands import app
from rebeca_ray.config.jobs import GenerateConfig, SampleConfig, TrainConfig
from rebeca_ray.config.sections import InteractionSettings, NetworkSettings, SelectionSettings
from rebeca_ray.data import histories as histories_module
from rebeca_ray.errors import InputError
from rebeca_ray.generation.planning.keys import settings_of_key
from rebeca_ray.halves import sample as sample_module
from rebeca_ray.halves.sample import Sampled, UserSampler, sample_embeddings
from rebeca_ray.notebook import FittedPrior
from rebeca_ray.prior.checkpoint import load_prior
from rebeca_ray.prior.selector import Selector
from rebeca_ray.storage.filesystem import exists, list_files
from rebeca_ray.storage.parquet import read_table
from tests.conftest import REPO, USERS, D, plan, snapshot_of, write_tiny_prior
from tests.generation.test_plan import plan_with_histories, write_histories, write_history_prior

REBECA = str(Path(sys.executable).parent / "rebeca")
STRANGERS = ["stranger", "passer-by"]


def run(folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    words = [REBECA, *shlex.split(command)[1:]]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)


def write_users(folder: Path, users: list[str]) -> str:
    pq.write_table(pa.table({"user_id": users}), folder / "users.parquet")
    return str(folder / "users.parquet")


@pytest.fixture
def sampling(config: GenerateConfig, tmp_path: Path) -> SampleConfig:
    """Write a prior by id with a selector, items, and users whom the prior knows or not."""
    write_tiny_prior(tmp_path, selector=Selector(D, num_factors=4))
    return SampleConfig(
        prior=config.prior,
        users=write_users(tmp_path, [STRANGERS[0], *USERS[:5], STRANGERS[1]]),
        out=str(tmp_path / "embeddings.parquet"),
        items=config.items,
        storage=str(tmp_path / "histories"),
        sampler=config.sampler,
        selection=SelectionSettings(max_item_similarity=0.5),  # so that some candidates are copies
        num_images=config.num_images,
    )


def rows_of(out: str) -> dict[tuple[str, int], tuple[float | None, list[float]]]:
    """Return like probability and embedding by user and rank."""
    rows = read_table(out, "out").to_pylist()
    return {(row["user_id"], row["rank"]): (row["like_probability"], row["image_embeds"]) for row in rows}


def planned_rows(rows: list[dict[str, object]], cold_start: list[str]) -> dict[tuple[str, int], object]:
    """Return the same of planned items. Those of the population are each cold-start user's."""
    return {
        (user, row["rank"]): (row["like_probability"], row["image_embeds"])  # type: ignore[misc]
        for row in rows
        for user in (cold_start if row["user_id"] == POPULATION_USER else [row["user_id"]])
    }


def test_the_embeddings_are_those_that_planning_chooses(
    config: GenerateConfig, sampling: SampleConfig
) -> None:
    sampled = sample_embeddings(sampling)
    assert sampled == Sampled(embeddings=21, users=7, cold_start_users=2)
    config = config.model_copy(update={"selection": sampling.selection})
    rows = plan(config, pa.table({"user_id": [*USERS[:5], *STRANGERS]})).to_pylist()
    assert rows_of(sampling.out) == planned_rows(rows, STRANGERS)
    assert len({tuple(row["image_embeds"]) for row in rows}) == 18  # the two strangers share three


def test_a_table_in_memory_equals_the_file(sampling: SampleConfig) -> None:
    sample_embeddings(sampling)
    in_memory = sampling.model_copy(update={"out": None})
    table = rr.sample(in_memory)
    assert table == read_table(str(sampling.out), "out")
    assert table.schema.metadata[b"rebeca.prior"] == load_prior(sampling.prior).fingerprint.encode()
    fitted = FittedPrior(
        folder=sampling.prior,
        figures={},
        config=TrainConfig(
            interactions=InteractionSettings(path="absent"),
            items=str(sampling.items),
            out=sampling.prior,
            storage=sampling.storage,
            network=NetworkSettings(user_encoder="id"),
        ),
    )
    settings = ["num_images=2", "sampler.num_inference_steps=4"]
    some = rr.sample(fitted, *settings, users=[USERS[3], USERS[1]])
    assert some["user_id"].to_pylist() == [USERS[3]] * 2 + [USERS[1]] * 2
    assert some == rr.sample(fitted.sample_config(), *settings, users=[USERS[3], USERS[1]])
    for config, users, message in (
        (sampling, None, "is set, but the embeddings stay in memory; leave it out"),
        (in_memory, "ann", "users: are the text 'ann'; give a list of users"),
        (in_memory, [1], "users: are no list of texts"),
        (in_memory, [], "users in memory: "),
        (in_memory, ["a", "a"], "1 user_ids are repeated"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            rr.sample(config, users=users)
    with pytest.raises(InputError, match="out: is missing; give a Parquet file"):
        sample_embeddings(in_memory)


def test_the_file_has_its_schema_and_names_its_models(sampling: SampleConfig) -> None:
    sample_embeddings(sampling)
    prior = load_prior(sampling.prior)
    table = read_table(sampling.out, "out")
    assert table.schema.equals(schemas.sampled(D, prior.fingerprint, None), check_metadata=True)
    assert table.schema.metadata == {b"rebeca.prior": prior.fingerprint.encode()}
    assert schemas.sampled(D, "a", "b").metadata == {b"rebeca.prior": b"a", b"rebeca.clip": b"b"}
    assert table.schema.field("image_embeds") == schemas.items(D).field("image_embeds")


def test_without_a_selector_like_probabilities_are_null(sampling: SampleConfig, tmp_path: Path) -> None:
    write_tiny_prior(tmp_path)
    sample_embeddings(sampling)
    assert read_table(sampling.out, "out")["like_probability"].null_count == 21


@pytest.mark.parametrize("seed", [0, 3])
def test_a_seed_is_that_of_the_chosen_candidate(sampling: SampleConfig, seed: int) -> None:
    sampling = sampling.model_copy(
        update={"seed": seed, "selection": SelectionSettings(candidates_per_item=1)}
    )
    sample_embeddings(sampling)
    prior = load_prior(sampling.prior)
    sampler = sampling.sampler.resolve(prior.sampling, prior.diffusion.num_train_timesteps)
    digests = {**{user: f"digest-{user}" for user in USERS}, POPULATION_USER: ""}
    keys = {
        user: identity.plan_key(
            prior=prior.fingerprint,
            settings=settings_of_key(sampling, sampler),
            user_id=user,
            history_digest=digest,
            generation=seed,
        )
        for user, digest in digests.items()
    }
    for row in read_table(sampling.out, "out").to_pylist():
        key = keys.get(row["user_id"], keys[POPULATION_USER])
        assert row["seed"] == identity.candidate_seed(key, row["rank"])


def test_all_users_of_the_table_are_sampled_in_any_batches(
    sampling: SampleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    everybody = sampling.model_copy(update={"users": None})
    assert sample_embeddings(everybody) == Sampled(embeddings=21, users=7, cold_start_users=0)
    assert pq.ParquetFile(everybody.out).num_row_groups == 1
    monkeypatch.setattr(sample_module, "ROWS_PER_GROUP", 7)
    monkeypatch.setattr(sample_module, "users_per_batch", lambda _: 1)
    again = everybody.model_copy(update={"out": f"{everybody.out}.parquet"})
    sample_embeddings(again)
    assert read_table(again.out, "out") == read_table(everybody.out, "out")
    groups = pq.ParquetFile(again.out).metadata
    assert [groups.row_group(number).num_rows for number in range(groups.num_row_groups)] == [6, 6, 6, 3]


@pytest.fixture
def by_history(sampling: SampleConfig, tmp_path: Path) -> SampleConfig:
    """Write a prior that knows users by their history, and the ratings of three users."""
    ratings = {"user_0": [(1, 5.0), (2, 1.0)], "new_user": [(3, 4.0)], "grumpy": [(4, 1.0), (5, 2.0)]}
    return sampling.model_copy(
        update={
            "prior": write_history_prior(tmp_path, "history"),
            "users": write_users(tmp_path, ["new-user", "stranger", "grumpy"]),
            "interactions": write_histories(tmp_path, **ratings),
        }
    )


def test_users_with_ratings_get_the_embeddings_of_planning(
    config: GenerateConfig, by_history: SampleConfig
) -> None:
    shared = {name: getattr(by_history, name) for name in ("prior", "interactions", "selection")}
    rows = plan_with_histories(config.model_copy(update=shared), ["new-user", "stranger", "grumpy", "user-0"])
    planned = planned_rows(rows, ["stranger"])
    assert sample_embeddings(by_history) == Sampled(embeddings=9, users=3, cold_start_users=1)
    assert rows_of(by_history.out) == {key: row for key, row in planned.items() if key[0] != "user-0"}
    everybody = by_history.model_copy(update={"users": None, "out": f"{by_history.out}.parquet"})
    assert sample_embeddings(everybody) == Sampled(embeddings=9, users=3, cold_start_users=0)
    assert rows_of(everybody.out) == {key: row for key, row in planned.items() if key[0] != "stranger"}


def test_ratings_of_generated_items_count_if_their_catalog_is_given(
    config: GenerateConfig, by_history: SampleConfig, tmp_path: Path
) -> None:
    shared = {name: getattr(by_history, name) for name in ("prior", "interactions", "selection")}
    config = config.model_copy(update=shared)
    snapshot_of(config.model_copy(update={"request": write_users(tmp_path, ["grumpy", "new-user"])}))
    generated = read_catalog(config.catalog).for_user("grumpy")["item_id"][0].as_py()
    ratings = {"user_id": ["grumpy", "grumpy"], "item_id": ["real-4", generated]}
    pq.write_table(pa.table(ratings), tmp_path / "interactions.parquet")
    planned = planned_rows(plan_with_histories(config, ["grumpy"]), [])
    sampling = by_history.model_copy(update={"users": write_users(tmp_path, ["grumpy"])})
    sample_embeddings(sampling.model_copy(update={"catalog": config.catalog}))
    assert rows_of(sampling.out) == planned
    without = sampling.model_copy(update={"out": f"{sampling.out}.parquet"})
    sample_embeddings(without)
    assert rows_of(without.out).keys() == planned.keys()
    assert rows_of(without.out) != planned


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize("everybody", [False, True])
def test_many_buckets_of_histories_give_the_same(
    by_history: SampleConfig, monkeypatch: pytest.MonkeyPatch, everybody: bool
) -> None:
    if everybody:
        by_history = by_history.model_copy(update={"users": None})
    expected = sample_embeddings(by_history)
    monkeypatch.setattr(histories_module, "ROWS_PER_BUCKET", 1)
    others = {"storage": f"{by_history.storage}-2", "out": f"{by_history.out}.parquet"}
    parts = by_history.model_copy(update=others)
    assert sample_embeddings(parts) == expected
    assert len([file for file in list_files(parts.storage) if file.endswith(".parquet")]) == 5
    assert rows_of(parts.out) == rows_of(by_history.out)


def test_a_failure_leaves_no_file(sampling: SampleConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "users_per_batch", lambda _: 2)
    monkeypatch.setattr(sample_module, "ROWS_PER_GROUP", 3)
    whole, calls = UserSampler.sample, []
    folder = Path(sampling.out).parent
    before = sorted(folder.iterdir())

    def fail(sampler: UserSampler, users: pa.Table) -> pa.Table:
        calls.append(len(users))
        if len(calls) == 3:
            assert not Path(sampling.out).exists()
            raise InputError("the third batch fails")
        return whole(sampler, users)

    monkeypatch.setattr(UserSampler, "sample", fail)
    with pytest.raises(InputError, match="the third batch fails"):
        sample_embeddings(sampling)
    assert calls == [2, 2, 1]
    assert sorted(folder.iterdir()) == before


def test_prior_users_and_output_may_be_in_an_object_store(
    sampling: SampleConfig, tmp_path: Path, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(S3FileSystem, "_cache", {})
    root = f"s3://rebeca/{tmp_path.name}"
    filesystem = S3FileSystem()
    filesystem.put(sampling.prior, f"{root}/prior", recursive=True)
    filesystem.put(str(sampling.users), f"{root}/users.parquet")
    sample_embeddings(sampling)
    places = {"prior": f"{root}/prior", "users": f"{root}/users.parquet", "out": f"{root}/out/e.parquet"}
    remote = sampling.model_copy(update=places)
    assert sample_embeddings(remote) == Sampled(embeddings=21, users=7, cold_start_users=2)
    assert read_table(remote.out, "out") == read_table(sampling.out, "out")
    with pytest.raises(InputError, match=re.escape(f"out {remote.out}: already exists; remove it")):
        sample_embeddings(remote)

    monkeypatch.setattr(sample_module, "ROWS_PER_GROUP", 5)
    monkeypatch.setattr(sample_module, "users_per_batch", lambda _: 1)
    monkeypatch.setattr(UserSampler, "sample_population", lambda *_: 1 / 0)  # after some row groups
    failing = remote.model_copy(update={"out": f"{root}/failed/e.parquet"})
    with pytest.raises(ZeroDivisionError):
        sample_embeddings(failing)
    assert not exists(failing.out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--prior prior --out e.parquet", "--users, --all: neither is given; give one of them"),
        (
            "--prior prior --out e.parquet --users users.parquet --all",
            "--users, --all: both are given; give one of them",
        ),
        (
            "--prior prior --out e.parquet --all --num-images 0",
            "options: num_images = 0: input should be greater than 0",
        ),
        (
            "--prior prior --out e.parquet --all sampler.step=3",
            "options: unknown key 'sampler.step'; known: batch_size,",
        ),
        (
            "--prior prior --out e.parquet --all sampler.num_inference_steps=101",
            "prior {folder}/prior: sampler.num_inference_steps is 101, it was trained on 100; take at most",
        ),
        ("--prior nothing --out e.parquet --all", "prior {folder}/nothing: no config.json there"),
        ("--prior prior --out e.csv --all", "out {folder}/e.csv: the output is a Parquet file; give a name"),
        ("--prior prior --out users.parquet --all", "out {folder}/users.parquet: already exists; remove it"),
        (
            "--prior prior --out users.parquet/e.parquet --all",
            "out {folder}/users.parquet: cannot be written",
        ),
        (
            "--prior prior --out e.parquet --users twice.parquet",
            "users {folder}/twice.parquet: 1 user_ids are repeated (rows 2); keep one row per user",
        ),
        (
            "--prior prior --out e.parquet --users items.parquet",
            "users {folder}/items.parquet: column 'user_id' is missing; did you mean",
        ),
        (
            "--prior history --out e.parquet --all",
            "prior {folder}/history knows users by their history; set `interactions` (and `items`)",
        ),
        (
            "--prior history --out e.parquet --all interactions.path=users.parquet",
            "interactions: need `items` too",
        ),
        (
            "--prior none --out e.parquet --all",
            "prior {folder}/none: knows no users; give users instead of all",
        ),
    ],
)
def test_a_mistake_is_one_line(
    sampling: SampleConfig,
    tmp_path: Path,
    options: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for encoder in ("history", "none"):
        write_history_prior(tmp_path, encoder)
    pq.write_table(pa.table({"user_id": ["a", "b", "a"]}), tmp_path / "twice.parquet")
    assert Path(sampling.prior) == tmp_path / "prior"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        app(["sample", *shlex.split(options)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(folder=tmp_path)}"), error
    assert error.count("\n") == 1
    assert not (tmp_path / "e.parquet").exists()


def test_a_gpu_that_is_missing_is_an_input_error(
    sampling: SampleConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sampler = sampling.sampler.model_copy(update={"device": "cuda"})
    with pytest.raises(InputError, match=r"torch sees no GPU here; set sampler\.device=cpu"):
        sample_embeddings(sampling.model_copy(update={"sampler": sampler}))


def test_the_commands_of_the_page_run_without_ray(by_history: SampleConfig, tmp_path: Path) -> None:
    section = (REPO / "infra" / "docs" / "data.md").read_text().split("\n## Embeddings alone\n")[1]
    by_id, by_ratings = section.split("```")[1].strip().splitlines()
    write_users(tmp_path, [USERS[0], *STRANGERS])
    (tmp_path / "items.parquet").rename(tmp_path / "items")
    out = run(tmp_path, by_id)
    assert out.returncode == 0, out.stderr
    assert out.stdout.replace("\n", "") == (
        f"sampled 30 embeddings of 3 users -> {tmp_path}/embeddings.parquet; "
        "2 of the users are unknown to the prior and share the population's"
    )
    Path(tmp_path / "prior").rename(tmp_path / "by-id")
    Path(by_history.prior).rename(tmp_path / "prior")
    script = "import sys; from rebeca_ray.cli.commands import app; app(standalone_mode=False); "
    script += "assert 'ray' not in sys.modules and 'diffusers' not in sys.modules"
    words = [sys.executable, "-c", script, *shlex.split(by_ratings)[1:]]
    ran = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.replace("\n", "") == (
        f"sampled 30 embeddings of 3 users -> {tmp_path}/everybody.parquet"
    )
    assert read_table(str(tmp_path / "everybody.parquet"), "out").num_rows == 30
