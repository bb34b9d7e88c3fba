"""Steering on a user's page: by requests, and in a real browser."""

import re
from collections.abc import Sequence
from html import unescape
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Browser, Page
from starlette.testclient import TestClient

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.gallery import steering as steering_module
from rebeca_ray.gallery.app import Gallery
from rebeca_ray.gallery.people import Histories
from rebeca_ray.gallery.source import Source
from rebeca_ray.gallery.steering import Steering
from tests.gallery.conftest import CHROMIUM, client_of, served
from tests.halves.test_steer import history_night

USER = "user-0"
ORIGIN = {"Origin": "http://127.0.0.1"}


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings) -> GenerateConfig:
    return history_night(tmp_path_factory.mktemp("steering"), tiny_decoder)


@pytest.fixture(scope="module")
def snapshot(night: GenerateConfig) -> Snapshot:
    return read_catalog(night.catalog)


@pytest.fixture(scope="module")
def models(night: GenerateConfig) -> Steering:
    """Loaded models, which the galleries of these tests share."""
    return Steering(night, None, None)


@pytest.fixture
def gallery(night: GenerateConfig, models: Steering, tmp_path: Path) -> Gallery:
    return gallery_of(night, models, tmp_path / "feedback.parquet")


def gallery_of(night: GenerateConfig, models: Steering, feedback: Path | None) -> Gallery:
    assert night.interactions is not None
    histories = Histories(night.interactions)
    steering = Steering(night, histories, str(feedback) if feedback else None)
    vars(steering)["steerer"] = models.steerer
    return Gallery(source=Source(night.catalog), histories=histories, steering=steering)


def steered(client: TestClient, **query: str) -> tuple[str, list[bytes]]:
    """Return a user's page and the images that are drawn on it."""
    page = client.get("/user", params={"id": USER, "draw": "1", **query})
    assert page.status_code == 200
    assert "no-store" in page.headers["cache-control"]
    images = [client.get(source) for source in re.findall(r'src="(/steered[^"]*)"', page.text)]
    assert all(image.headers["content-type"] == "image/png" for image in images)
    return page.text, [image.content for image in images]


def test_a_page_loads_no_model_before_somebody_steers(night: GenerateConfig) -> None:
    assert night.interactions is not None
    steering = Steering(night, Histories(night.interactions), None)
    client = client_of(Gallery(source=Source(night.catalog), steering=steering))
    page = client.get("/user", params={"id": USER}).text
    assert f'href="/user?id={USER}&amp;draw=1">Steer this user' in page
    assert "<select" not in page
    assert "steerer" not in vars(steering)


def test_without_a_change_the_images_are_the_published_ones(gallery: Gallery, snapshot: Snapshot) -> None:
    page, images = steered(client_of(gallery))
    assert images == snapshot.images(snapshot.for_user(USER))
    assert "these are the published images" in page
    sliders = {
        name: tuple(map(float, numbers))
        for name, *numbers in re.findall(
            r'<input type="range" id="(\w+)" name="\1" min="(.*?)" max="(.*?)" step=".*?" value="(.*?)"', page
        )
    }
    assert sliders == {
        "prior_guidance_scale": (1, 10, 2),
        "selector_guidance_scale": (0, 20, 0),
        "num_inference_steps": (3, 30, 4),
        "ratings_per_vote": (1, 64, 8),
        "candidates_per_item": (1, 64, 16),
        "diversity": (0, 1, 0.15),
    }


def test_votes_and_sliders_change_the_images_and_stay_on_the_page(
    gallery: Gallery, snapshot: Snapshot
) -> None:
    client = client_of(gallery)
    first, second, *_ = snapshot.for_user(USER)["item_id"].to_pylist()
    _, published = steered(client)
    page, voted = steered(client, **{f"vote.{first}": "more", f"vote.{second}": "less"})
    assert not {*voted} & {*published}
    selects = page.split("<select ")
    assert 'value="more" selected' in selects[1]
    assert 'value="less" selected' in selects[2]
    assert all("selected" not in select for select in selects[3:])
    page, turned = steered(client, diversity="0.9")
    assert turned != published
    assert "published images" not in page
    assert 'value="0.9"' in page


def test_a_bad_setting_or_a_lost_model_is_a_message(gallery: Gallery, night: GenerateConfig) -> None:
    client = client_of(gallery)
    for query, message in (
        ({"diversity": "7"}, "steering: diversity = 7.0: input should be less than or equal to 1"),
        ({"num_inference_steps": "2"}, "take at least 3"),
        ({"candidates_per_item": "<b>1e9"}, ""),  # no number: the config's
        ({"candidates_per_item": "1e300"}, "candidates_per_item"),
        ({"vote.<b>x": "more"}, ""),  # an item that nothing holds an embedding of
    ):
        page, images = steered(client, **query)
        assert (len(images) == 0) == bool(message)
        assert message in unescape(page)
        assert "<b>" not in page
    steering = Steering(night.model_copy(update={"prior": "/nowhere"}), None, None)
    page, images = steered(client_of(Gallery(source=Source(night.catalog), steering=steering)))
    assert images == []
    assert 'class="warn">prior /nowhere' in page


def test_images_are_kept_for_a_while(gallery: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steering_module, "DRAWINGS", 2)
    client = client_of(gallery)
    pages = [client.get("/user", params={"id": USER, "draw": "1"}).text for _ in range(3)]
    sources = [re.findall(r'src="(/steered[^"]*)"', page)[0] for page in pages]
    assert [client.get(source).status_code for source in sources] == [404, 200, 200]
    assert client.get(f"{sources[2][:-1]}9").status_code == 404


def test_votes_are_saved_as_interactions(gallery: Gallery, snapshot: Snapshot, tmp_path: Path) -> None:
    client, feedback = client_of(gallery), tmp_path / "feedback.parquet"
    first, second, *_ = snapshot.for_user(USER)["item_id"].to_pylist()
    form = {"id": USER, "draw": "1", "diversity": "0.9", f"vote.{first}": "more", f"vote.{second}": "less"}
    response = client.post("/feedback", data=form, headers=ORIGIN)
    assert (response.status_code, response.headers["location"]) == (303, f"/user?id={USER}&saved=2")
    assert f"2 votes in {feedback}" in client.get(response.headers["location"]).text
    rows = [(row["user_id"], row["item_id"], row["rating"]) for row in pq.read_table(feedback).to_pylist()]
    assert rows == [(USER, first, 5.0), (USER, second, 1.0)]


def test_a_form_that_may_not_be_saved_changes_nothing(
    gallery: Gallery, night: GenerateConfig, models: Steering, snapshot: Snapshot, tmp_path: Path
) -> None:
    client = client_of(gallery)
    item = snapshot.for_user(USER)["item_id"][0].as_py()
    form = {"id": USER, f"vote.{item}": "more"}
    for changes, headers, status in (
        ({}, {}, 403),  # not from a page
        ({}, {"Origin": "http://evil.example"}, 403),
        ({}, {"Origin": "null"}, 403),
        ({"id": "nobody"}, ORIGIN, 404),
        ({"vote.0123": "less"}, ORIGIN, 404),
        ({f"vote.{item}": "maybe"}, ORIGIN, 422),
        ({"x": "y" * 70_000}, ORIGIN, 413),
    ):
        assert client.post("/feedback", data={**form, **changes}, headers=headers).status_code == status
    assert not (tmp_path / "feedback.parquet").exists()
    without_file = client_of(gallery_of(night, models, None)).post("/feedback", data=form, headers=ORIGIN)
    assert "start the gallery with --feedback" in without_file.text
    assert client.get("/feedback").status_code == 405


def drawn(page: Page, after: Sequence[str] = ()) -> list[str]:
    """Return the addresses of the drawn images, as soon as some differ from earlier ones."""
    # `wait_for_function` would need a script, which the policy refuses.
    while True:
        sources: list[str] = page.evaluate("[...document.querySelectorAll('#steered img')].map(i => i.src)")
        if sources and sources != after:
            return sources
        page.wait_for_timeout(50)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_person_steers_by_keyboard_and_saves(
    browser: Browser, gallery: Gallery, snapshot: Snapshot, tmp_path: Path
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with served(gallery) as address:
        phone = {"width": 390, "height": 844}
        page = browser.new_context(viewport=phone).new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(f"{address}/user?id={USER}")
        page.get_by_role("link", name="Steer this user").click()
        page.wait_for_url("**draw=1**")
        first = drawn(page)
        assert len(first) == 4

        # A slider draws again without another page.
        page.evaluate("window.kept = true")
        page.get_by_label("Diversity").press("ArrowRight")
        second = drawn(page, after=first)
        assert page.evaluate("document.querySelector('output[for=diversity]').value") == "0.2"
        page.get_by_label("Vote on image 1").select_option("less")
        assert len(drawn(page, after=second)) == 4
        assert page.evaluate("window.kept")
        item = snapshot.for_user(USER)["item_id"][0].as_py()
        assert f"vote.{item}=less" in page.url
        assert "diversity=0.2" in page.url

        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        with_axe = browser.new_context(viewport=phone, bypass_csp=True).new_page()  # a script of the test
        with_axe.goto(page.url)
        violations = Axe().run(with_axe).response["violations"]
        assert [(violation["id"], violation["nodes"][0]["html"]) for violation in violations] == []

        # The address alone leads to the same votes.
        page.reload()
        assert page.get_by_label("Vote on image 1").input_value() == "less"
        page.get_by_role("button", name="Save votes as feedback").click()
        page.wait_for_url("**saved=1")
        assert "1 vote in" in (page.get_by_role("status").text_content() or "")
        assert pq.read_table(tmp_path / "feedback.parquet")["item_id"].to_pylist() == [item]
        assert problems == []
