"""Steering: the published images without a change, and those of the next night with a user's votes."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from rebeca_ray import schemas
from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.data.interactions import open_interactions, read_columns
from rebeca_ray.errors import InputError
from rebeca_ray.halves import sample as sample_module
from rebeca_ray.halves.steer import IMAGES, Settled, SteeredUser, Steerer
from rebeca_ray.identity import hash128
from tests.conftest import D, generate_config, snapshot_of
from tests.generation.test_plan import plan_with_histories, write_histories, write_history_prior


@pytest.fixture
def night(tmp_path: Path, tiny_decoder: DecoderSettings) -> GenerateConfig:
    return history_night(tmp_path, tiny_decoder)


def history_night(folder: Path, decoder: DecoderSettings) -> GenerateConfig:
    """Publish a night of four images per user, by a prior that reads histories."""
    config = generate_config(folder, decoder).model_copy(
        update={
            "prior": write_history_prior(folder, "history"),
            "interactions": write_histories(folder, user_0=[(1, 5.0), (2, 1.0)], user_2=[(3, 4.0)]),
            "num_images": IMAGES,
        }
    )
    snapshot_of(config)
    return config


def steered(config: GenerateConfig, snapshot: Snapshot, user_id: str) -> SteeredUser:
    assert config.interactions is not None
    (user,) = snapshot.table("users", None, [user_id]).to_pylist()
    ratings = read_columns(open_interactions(config.interactions))
    items = snapshot.items(["item_id", "image_embeds"], [user_id])
    return SteeredUser(
        user_id=user_id,
        history_digest=user["history_digest"],
        generation=user["generation"],
        ratings=ratings.filter(pc.equal(ratings["user_id"], user_id)),
        items=items.select(schemas.embedded_items(D).names).cast(schemas.embedded_items(D)),
    )


def pictures(table: pa.Table) -> list[bytes]:
    return [image["bytes"] for image in table["image"].to_pylist()]


@pytest.mark.parametrize("user_id", ["user-0", "user-2"])  # the second one has a prompt
def test_without_a_change_the_images_are_the_published_ones(night: GenerateConfig, user_id: str) -> None:
    snapshot = read_catalog(night.catalog)
    drawn = Steerer(night).draw(steered(night, snapshot, user_id), {}, Settled())
    items = snapshot.for_user(user_id)
    assert drawn["item_id"].to_pylist() == items["item_id"].to_pylist()
    assert drawn["like_probability"].to_pylist() == items["like_probability"].to_pylist()
    assert pictures(drawn) == snapshot.images(items)


def test_votes_change_taste_as_saved_ratings_would(
    night: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert night.interactions is not None
    snapshot = read_catalog(night.catalog)
    user = steered(night, snapshot, "user-0")
    first, second = snapshot.for_user("user-0")["item_id"].to_pylist()[:2]
    votes = {first: True, second: False, "real-2": True}  # the user disliked it before
    embeds = {}
    choose = sample_module.UserSampler.choose

    def keep(sampler: sample_module.UserSampler, users: pa.Table, keys: list[str]) -> object:
        chosen = choose(sampler, users, keys)
        embeds[keys[0]] = chosen.embeds_KD.tolist()
        return chosen

    monkeypatch.setattr(sample_module.UserSampler, "choose", keep)
    drawn = Steerer(night).draw(user, votes, Settled(ratings_per_vote=1))
    assert not {*pictures(drawn)} & {*snapshot.images(snapshot.for_user("user-0"))}
    assert list(Path(night.catalog).glob("rated/*")) == []  # nothing is written

    # The next night with those ratings in the file samples from the same history, with other noise.
    rows = [
        *(row for row in user.ratings.to_pylist() if row["item_id"] != "real-2"),
        *(
            {"user_id": "user-0", "item_id": item, "rating": 5.0 if liked else 1.0}
            for item, liked in votes.items()
        ),
    ]
    pq.write_table(pa.Table.from_pylist(rows, user.ratings.schema), night.interactions.path)
    monkeypatch.setattr("rebeca_ray.generation.planning.planner.plan_keys", lambda *_: [*embeds])
    planned = plan_with_histories(night, ["user-0"])
    assert [row["image_embeds"] for row in planned] == embeds[next(iter(embeds))]


def test_each_setting_changes_the_images(night: GenerateConfig) -> None:
    snapshot = read_catalog(night.catalog)
    user, steerer = steered(night, snapshot, "user-0"), Steerer(night)
    changes = (
        {"prior_guidance_scale": 5.0},
        {"selector_guidance_scale": 50.0},
        {"num_inference_steps": 8},
        {"candidates_per_item": 1},
        {"diversity": 1.0},
    )
    seen = {hash128(*map(bytes.hex, pictures(steerer.draw(user, {}, Settled()))))}
    for values in changes:
        drawn = steerer.draw(user, {}, Settled(**values))
        assert drawn.num_rows == IMAGES
        seen.add(hash128(*map(bytes.hex, pictures(drawn))))
    assert len(seen) == 1 + len(changes)
    with pytest.raises(InputError, match="take at least 3"):
        steerer.draw(user, {}, Settled(num_inference_steps=2))


def test_a_user_without_ratings_follows_votes_too(night: GenerateConfig) -> None:
    snapshot = read_catalog(night.catalog)
    user, steerer = steered(night, snapshot, "user-3"), Steerer(night)
    without, liked, disliked = (
        pictures(steerer.draw(user, votes, Settled())) for votes in ({}, {"real-7": True}, {"real-7": False})
    )
    assert len({*without, *liked, *disliked}) == 3 * IMAGES
    heavier = pictures(steerer.draw(user, {"real-7": True, "real-9": True}, Settled(ratings_per_vote=16)))
    lighter = pictures(steerer.draw(user, {"real-7": True, "real-9": True}, Settled(ratings_per_vote=1)))
    assert heavier != lighter
    # An item that nothing holds an embedding of changes nothing.
    assert pictures(steerer.draw(user, {"unknown": True}, Settled())) == without


def test_a_user_that_the_request_lacks_is_refused(night: GenerateConfig) -> None:
    user = steered(night, read_catalog(night.catalog), "user-0")
    other = SteeredUser(**{**vars(user), "user_id": "nobody"})
    with pytest.raises(InputError, match="lacks this user"):
        Steerer(night).draw(other, {}, Settled())
