"""A small published catalog whose users have hostile names, and a gallery of it."""

import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html import unescape
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import uvicorn
import yaml
from playwright.sync_api import Browser, Page, sync_playwright
from starlette.testclient import TestClient

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.sections import InteractionSettings
from rebeca_ray.gallery.app import Gallery, build_app
from rebeca_ray.gallery.people import Histories, RealItems
from rebeca_ray.gallery.serve import listen
from rebeca_ray.gallery.source import Source
from tests.conftest import generate_config, prior_users, snapshot_of, write_tiny_prior

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "../../../etc/passwd",
    "50% & more?x=1#y",
    "{{ 7 * 7 }}",
    "Ünïcödé 😀",
]
NAMES = [*HOSTILE, *(f"user-{number:03d}" for number in range(130))]


def write_night(folder: Path, decoder: DecoderSettings, names: list[str]) -> GenerateConfig:
    """Write the inputs of a night with one image per user; return its config."""
    config = generate_config(folder, decoder)
    write_tiny_prior(folder, users=prior_users(names))
    pq.write_table(pa.table({"user_id": names}), folder / "request.parquet")
    return config.model_copy(update={"num_images": 1})


@pytest.fixture(scope="session")
def night(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings) -> GenerateConfig:
    """A published night of NAMES. Tests that publish more copy its folder."""
    config = write_night(tmp_path_factory.mktemp("gallery"), tiny_decoder, NAMES)
    snapshot_of(config)
    return config


@pytest.fixture(scope="session")
def snapshot(night: GenerateConfig) -> Snapshot:
    return read_catalog(night.catalog)


@pytest.fixture(scope="session")
def gallery(night: GenerateConfig, snapshot: Snapshot) -> Gallery:
    """The gallery of the night. One user likes two of its images, which stand for real items."""
    folder = Path(night.catalog).parent
    items = snapshot.items().slice(0, 2)
    images = [
        {"item_id": f"liked <b>{number}</b>", "image": {"bytes": image, "path": "x.png"}}
        for number, image in enumerate(snapshot.images(items))
    ]
    pq.write_table(pa.Table.from_pylist(images), folder / "real.parquet")
    ratings = {
        "user_id": [HOSTILE[0], HOSTILE[0], HOSTILE[0], "user-000"],
        "item_id": ["liked <b>0</b>", "liked <b>1</b>", "disliked", "disliked"],
        "rating": pa.array([5, 4, 1, 2], pa.float32()),
    }
    pq.write_table(pa.table(ratings), folder / "interactions.parquet")
    (folder / "generate.yaml").write_text(yaml.safe_dump(night.model_dump(mode="json")))
    return Gallery(
        source=Source(night.catalog),
        histories=Histories(InteractionSettings(path=str(folder / "interactions.parquet"))),
        real_items=RealItems(str(folder / "real.parquet")),
        config=str(folder / "generate.yaml"),
    )


@pytest.fixture
def client(gallery: Gallery) -> TestClient:
    return client_of(gallery)


@contextmanager
def served(gallery: Gallery) -> Iterator[str]:
    """Serve a gallery on a free port; yield its address."""
    listening = listen("127.0.0.1", 0, [])
    server = uvicorn.Server(
        uvicorn.Config(
            build_app(gallery, listening.hosts), log_config=None, log_level="warning", access_log=False
        )
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
        # For this browser, another site's name leads to this machine, as after DNS rebinding.
        arguments = ["--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    context = browser.new_context()
    yield context.new_page()
    context.close()


def client_of(gallery: Gallery, token: str | None = None) -> TestClient:
    app = build_app(gallery, ["127.0.0.1", "localhost"], token)
    return TestClient(app, base_url="http://127.0.0.1", follow_redirects=False)


def links(html: str, path: str) -> list[str]:
    """Return the links of a page to one path, in order, each once."""
    return [
        *dict.fromkeys(
            unescape(link) for link in re.findall(r'href="([^"]*)"', html) if link.startswith(path)
        )
    ]


def pictures(html: str) -> list[str]:
    return [unescape(source) for source in re.findall(r'src="(/picture[^"]*)"', html)]
