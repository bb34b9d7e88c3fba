"""The pages in a real browser: accessible, no wider than a phone, and free of scripts from hostile names."""

import shutil
import threading
import time
from collections.abc import Iterator
from urllib.parse import quote

import pytest
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright

from rebeca_ray.catalog.read import Snapshot
from rebeca_ray.gallery.app import Gallery, build_app
from rebeca_ray.gallery.serve import listen
from tests.gallery.conftest import HOSTILE, NAMES

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def address(gallery: Gallery) -> Iterator[str]:
    """Serve the gallery on a free port."""
    listening = listen("127.0.0.1", 0, [])
    server = uvicorn.Server(
        uvicorn.Config(build_app(gallery, listening.hosts), log_level="warning", access_log=False)
    )
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening.server]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listening.url.rstrip("/")
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_accessible_and_fits_a_phone(
    browser: Browser, address: str, snapshot: Snapshot, scheme: str
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    # Axe is a script of the test, which the pages' policy refuses.
    context_with_axe = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme=scheme, bypass_csp=True
    )
    page, with_axe = context.new_page(), context_with_axe.new_page()
    dialogs: list[str] = []
    page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    for path in all_pages(snapshot):
        page.goto(address + path, wait_until="load")
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= 390, f"{path} is {width} pixels wide"
        with_axe.goto(address + path, wait_until="load")
        violations = Axe().run(with_axe).response["violations"]
        assert [(path, violation["id"], violation["nodes"][0]["html"]) for violation in violations] == []
    assert dialogs == []
    for opened in (context, context_with_axe):
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


def test_images_load_and_pages_follow_each_other(page: Page, address: str) -> None:
    page.goto(address)
    shown = "document.querySelectorAll('main img').length"
    assert page.evaluate(shown) == 60
    page.locator("main img").last.scroll_into_view_if_needed()
    loaded = "[...document.querySelectorAll('main img')].every(image => image.naturalWidth > 0)"
    while not page.evaluate(loaded):  # `wait_for_function` would need a script, which the policy refuses
        page.mouse.wheel(0, 400)
        page.wait_for_timeout(50)
    page.get_by_role("link", name="next →").click()
    page.get_by_role("link", name="next →").click()
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
