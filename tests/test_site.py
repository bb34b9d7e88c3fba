"""The documentation site: it builds without warnings, links resolve, and nothing comes from another host."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from playwright.sync_api import sync_playwright

import rebeca_ray
from tests.conftest import REPO

CONFIG = REPO / "infra" / "mkdocs.yml"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class Page(HTMLParser):
    """The ids of a page, its links, and the files that a browser loads with it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.ids, self.links, self.loaded = path, {""}, set[str](), set[str]()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.ids.add(values.get("id", ""))
        if tag == "a" and "href" in values:
            self.links.add(values["href"])
        elif tag == "link" and values["rel"] not in ("prev", "next", "canonical"):
            self.loaded.add(values["href"])
        elif "src" in values:
            self.loaded.add(values["src"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site as `make docs` does, in a copy of its sources. A warning ends the build."""
    root = tmp_path_factory.mktemp("site")
    shutil.copytree(REPO / "infra" / "docs", root / "infra" / "docs")
    shutil.copy(CONFIG, root / "infra")
    shutil.copy(REPO / "CONTRIBUTING.md", root)
    (root / "rebeca_ray").symlink_to(REPO / "rebeca_ray")
    recipe = (REPO / "Makefile").read_text().split("\ndocs: setup\n")[1].split("\n\n")[0]
    *_, copy, build = (line.strip() for line in recipe.splitlines())
    script = f"{copy} && {build.replace('$(BIN)/zensical', f'{sys.executable} -m zensical')}"
    built = subprocess.run(["sh", "-c", script], cwd=root, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return root / "infra" / "site"


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in site.rglob("*.html") if path.name != "404.html"}


def test_every_page_is_in_the_navigation_once(pages: dict[Path, Page]) -> None:
    names = sorted({path.name for path in (REPO / "infra" / "docs").glob("*.md")} | {"contributing.md"})
    assert sorted(names_in(yaml.safe_load(CONFIG.read_text())["nav"])) == names
    assert sorted(path.name for path in pages) == [name.replace(".md", ".html") for name in names]


def names_in(entries: list[dict[str, Any]]) -> Iterator[str]:
    for entry in entries:
        for value in entry.values():
            yield from [value] if isinstance(value, str) else names_in(value)


def test_every_link_and_anchor_resolves(pages: dict[Path, Page]) -> None:
    broken = [
        f"{page.path.name}: {link}"
        for page in pages.values()
        for link in page.links | page.loaded
        if not urlsplit(link).scheme and not resolves(page, link, pages)
    ]
    assert not broken, "\n".join(broken)


def resolves(page: Page, link: str, pages: dict[Path, Page]) -> bool:
    """Return whether a relative link names a file of the site, and an id of it if it has an anchor."""
    parts = urlsplit(link)
    path = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
    if path.is_dir():
        path /= "index.html"
    target = pages.get(path)
    return path.is_file() and (target is None or unquote(parts.fragment) in target.ids)


def test_nothing_is_loaded_from_another_host(site: Path, pages: dict[Path, Page]) -> None:
    for page in pages.values():
        assert page.loaded
        assert not [link for link in page.loaded if urlsplit(link).netloc], page.path.name
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//", sheet.read_text()), sheet.name


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_asks_no_other_host(site: Path) -> None:
    handler = partial(SimpleHTTPRequestHandler, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, requested = browser.new_page(), list[str]()
        page.on("request", lambda request: requested.append(request.url))
        page.goto(f"http://127.0.0.1:{server.server_port}/concepts.html", wait_until="networkidle")
        browser.close()
        server.shutdown()
    assert {urlsplit(url).netloc for url in requested} == {f"127.0.0.1:{server.server_port}"}
    assert any(url.endswith("/search.json") for url in requested)  # the scripts have run


def test_the_site_shows_the_page_of_the_top_folder(pages: dict[Path, Page], site: Path) -> None:
    page = pages[site / "contributing.html"]
    assert {"traps", "a-decoder-family"} <= page.ids
    assert "architecture.html#glossary" in page.links


def test_the_reference_has_every_public_name(pages: dict[Path, Page], site: Path) -> None:
    page = pages[site / "api.html"]
    assert {f"{module}.{name}" for name, module in rebeca_ray._PUBLIC.items()} <= page.ids
    methods = ("refresh", "for_user", "images", "items", "to_pandas", "to_ray", "uris")
    assert {f"rebeca_ray.catalog.read.Snapshot.{name}" for name in methods} <= page.ids
