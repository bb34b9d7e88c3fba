"""The pages in a real browser: accessible, no wider than a phone, and free of scripts from hostile names."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from urllib.parse import quote

import fsspec
import pytest
from playwright.sync_api import Browser, Page
from typer.testing import CliRunner

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.cli.commands import app
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.gallery import source as source_module
from rebeca_ray.gallery.app import Gallery
from rebeca_ray.gallery.source import Source
from tests.conftest import assembled, prepare, publish, snapshot_of
from tests.faulty_s3 import FaultyS3, forever
from tests.gallery.conftest import CHROMIUM, HOSTILE, NAMES, served, write_night

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def address(gallery: Gallery) -> Iterator[str]:
    with served(gallery) as address:
        yield address


def all_pages(snapshot: Snapshot) -> list[str]:
    """Return an address of every kind of page, of a user with a hostile name where there is one."""
    name = quote(HOSTILE[0], safe="")
    item = snapshot.for_user(HOSTILE[0])["item_id"][0].as_py()
    manifest = snapshot.manifest
    return [
        "/",
        "/?q=user-0",
        f"/user?id={name}",
        f"/item?user={name}&id={item}",
        "/items?filter=near&limit=-1",
        "/items?filter=failed",
        "/snapshot",
        "/map",
        f"/compare?against={manifest.run_date}/{manifest.run_id}",
        "/user?id=nobody",
    ]


def test_every_page_is_accessible_in_both_colour_schemes_and_fits_a_phone(
    browser: Browser, address: str, snapshot: Snapshot
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": 390, "height": 844})
    # Axe is a script of the test, which the pages' policy refuses.
    context_with_axe = browser.new_context(viewport={"width": 390, "height": 844}, bypass_csp=True)
    page, with_axe = context.new_page(), context_with_axe.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    for path in all_pages(snapshot):
        page.goto(address + path, wait_until="load")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{path} is {width} pixels wide"
        with_axe.goto(address + path, wait_until="load")
        for scheme in ("light", "dark"):
            with_axe.emulate_media(color_scheme=scheme)
            violations = Axe().run(with_axe).response["violations"]
            assert [(path, scheme, one["id"], one["nodes"][0]["html"]) for one in violations] == []
    assert dialogs == []
    for opened in (context, context_with_axe):
        opened.close()


def test_images_load_and_pages_follow_each_other(page: Page, address: str) -> None:
    page.goto(address)
    shown = "document.querySelectorAll('main img').length"
    assert page.evaluate(shown) == 60
    page.locator("main img").last.scroll_into_view_if_needed()
    loaded = "[...document.querySelectorAll('main img')].every(image => image.naturalWidth > 0)"
    while not page.evaluate(loaded):  # `wait_for_function` would need a script, which the policy refuses
        page.mouse.wheel(0, 400)
        page.wait_for_timeout(50)
    for start in (60, 120):
        page.get_by_role("link", name="next →").click()
        page.wait_for_url(f"**/?start={start}")
    assert page.evaluate(shown) == len(NAMES) - 120
    assert page.get_by_role("link", name="next →").count() == 0


def test_a_person_searches_and_reaches_an_image_by_keyboard_alone(page: Page, address: str) -> None:
    page.goto(address)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.get_by_label("User id begins with").focus()
    page.keyboard.type("user-042")
    page.keyboard.press("Enter")
    page.wait_for_url("**/?q=user-042")
    page.get_by_role("link", name="user-042").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/user?id=user-042")
    page.get_by_role("link", name="Generated image 1 for user-042").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/item?*")
    assert page.get_by_role("heading", level=1).text_content() == "Image 1 for user-042"


def test_hostile_names_run_no_script(page: Page, address: str) -> None:
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    for name in HOSTILE:
        page.goto(f"{address}/user?id={quote(name, safe='')}", wait_until="load")
        assert page.get_by_role("heading", level=1).text_content() == name
    assert dialogs == []


def test_a_snapshot_that_is_published_meanwhile_is_shown_next(
    page: Page, tmp_path: Path, tiny_decoder: DecoderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    config = write_night(tmp_path, tiny_decoder, ["ann", "ben"])
    snapshot_of(config)
    first = read_catalog(config.catalog)
    with served(Gallery(source=Source(config.catalog))) as address:
        page.goto(f"{address}/user?id=ann")
        assert page.locator("main img").count() == 1
        snapshot_of(config.model_copy(update={"run_date": date(2031, 1, 1), "num_images": 2}))
        second = read_catalog(config.catalog)
        # The open page stays whole, and the next one is of the new snapshot.
        page.get_by_role("link", name="Generated image 1 for ann").click()
        page.wait_for_url("**/item?*", wait_until="load")
        assert page.evaluate("document.querySelector('main img').naturalWidth") == 16
        page.goto(f"{address}/user?id=ann")
        assert f"run {second.run_id}" in (page.get_by_role("banner").text_content() or "")
        assert page.locator("main img").count() == 2
        page.get_by_role("link", name="Snapshot").click()
        page.get_by_role("link", name=str(first.run_id)).first.click()
        page.get_by_role("link", name="Users").click()
        assert f"run {first.run_id}" in (page.get_by_role("banner").text_content() or "")
        page.get_by_role("link", name="show the published one").click()
        assert f"run {second.run_id}" in (page.get_by_role("banner").text_content() or "")


def test_a_user_without_an_item_has_a_page_and_a_catalog_without_a_snapshot_no_gallery(
    page: Page, tmp_path: Path, tiny_decoder: DecoderSettings
) -> None:
    config = write_night(tmp_path, tiny_decoder, ["ann", "ben"])
    prepared = prepare(config, break_first=True)
    assembled(config, prepared, error_budget=0.5)
    publish(config.catalog, prepared.run)
    failed = read_catalog(config.catalog).table("errors")["user_id"].to_pylist()
    with served(Gallery(source=Source(config.catalog))) as address:
        page.goto(f"{address}/user?id={failed[0]}")
        assert "No items." in (page.locator("main").text_content() or "")
        assert "image_embeds is not finite" in (page.get_by_role("table").text_content() or "")
    (tmp_path / "empty").mkdir()
    result = CliRunner().invoke(app, ["gallery", str(tmp_path / "empty")])
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert "nothing is published there" in result.output


def test_a_store_that_is_gone_is_said_and_comes_back(
    page: Page,
    proxy: FaultyS3,
    tmp_path: Path,
    tiny_decoder: DecoderSettings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(source_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    config = write_night(tmp_path, tiny_decoder, ["ann"])
    snapshot_of(config)
    fsspec.filesystem("s3").put(f"{config.catalog}/", "rebeca/browser/catalog/", recursive=True)
    with served(Gallery(source=Source("s3://rebeca/browser/catalog"))) as address:
        page.goto(address)
        proxy.misbehave(forever("error"))
        page.get_by_role("link", name="ann").click()
        assert page.get_by_role("heading", level=1).text_content() == "The store does not answer"
        assert "s3://rebeca/browser/catalog" in (page.get_by_role("alert").text_content() or "")
        proxy.misbehave([])
        page.get_by_role("link", name="Back to all users").click()
        assert page.get_by_role("link", name="ann").count() == 1


def test_a_name_that_leads_here_reads_nothing(page: Page, address: str) -> None:
    port = address.rpartition(":")[2]
    response = page.goto(f"http://evil.example:{port}/user?id=user-000")
    assert response is not None
    assert response.status == 421
    assert "this gallery answers for 127.0.0.1" in (page.text_content("body") or "")
    assert "user-000" not in page.content()
