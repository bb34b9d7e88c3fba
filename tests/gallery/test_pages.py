"""The pages by requests: every row is shown, every text is escaped, and only this host's pages may ask."""

import shutil
from datetime import date
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
from starlette.testclient import TestClient

from rebeca_ray.catalog.read import Snapshot, read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.errors import InputError
from rebeca_ray.gallery import source as source_module
from rebeca_ray.gallery import tables as tables_module
from rebeca_ray.gallery.app import Gallery
from rebeca_ray.gallery.map import cells
from rebeca_ray.gallery.serve import listen, parse_bind
from rebeca_ray.gallery.source import Source
from rebeca_ray.gallery.tables import Position, Tables
from rebeca_ray.gallery.views import ITEM, filter_of
from tests.conftest import D, assembled, prepare, publish, snapshot_of
from tests.faulty_s3 import FaultyS3, forever
from tests.gallery.conftest import HOSTILE, NAMES, client_of, links, pictures, write_night


def test_the_pages_of_users_show_every_user_once(client: TestClient) -> None:
    users, page = [], "/"
    while True:
        html = client.get(page).text
        users += links(html, "/user?")
        assert len(pictures(html)) == len(links(html, "/user?")) <= 60
        if 'rel="next"' not in html:
            break
        page = links(html, "/?start=")[-1]
    assert len(users) == len({*users}) == len(NAMES)
    for link, name in zip(users, sorted(NAMES), strict=True):
        response = client.get(link)
        assert response.status_code == 200
        assert name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in response.text.replace(
            "&#34;", '"'
        )


def test_a_search_lists_users_by_the_beginning_of_their_ids(client: TestClient) -> None:
    html = client.get("/", params={"q": "user-01"}).text
    assert [link.rpartition("=")[2] for link in links(html, "/user?")] == [f"user-01{n}" for n in range(10)]
    html = client.get("/", params={"q": HOSTILE[0]}).text
    assert len(links(html, "/user?")) == 1
    assert "No user of this snapshot begins" in client.get("/", params={"q": "nobody"}).text
    assert len(links(client.get("/", params={"q": "user-"}).text, "/user?")) == 60


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_ids_are_text_on_every_page(client: TestClient, snapshot: Snapshot, name: str) -> None:
    (item,) = snapshot.for_user(name).to_pylist()
    pages = [
        client.get("/", params={"q": name}),
        client.get("/user", params={"id": name}),
        client.get("/item", params={"user": name, "id": item["item_id"]}),
        client.get("/user", params={"id": f"{name}{name}"}),
    ]
    assert [page.status_code for page in pages] == [200, 200, 200, 404]
    for page in pages:
        assert "<script" not in page.text
        assert "<img src=x" not in page.text
        assert ">49<" not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["cache-control"] == "no-store"


def test_images_are_read_by_reference_and_stay_in_the_browser(client: TestClient, snapshot: Snapshot) -> None:
    items = snapshot.for_user("user-007")
    html = client.get("/user", params={"id": "user-007"}).text
    (thumbnail,) = pictures(html)
    assert "base64" not in html
    image = client.get(thumbnail.replace("/thumbnail", "/image"))
    assert image.content == snapshot.images(items)[0]
    assert image.headers["content-type"] == "image/png"
    assert "immutable" in image.headers["cache-control"]
    stored = snapshot.table("images", ["item_id", "thumbnail"])
    row = stored.filter(pc.equal(stored["item_id"], items["item_id"][0]))
    assert client.get(thumbnail).content == row["thumbnail"][0].as_py()
    for wrong in ("9999/0/image", f"0/{'9' * 5000}/image", "x/y/image", "0/999999/image", "0/0/metadata"):
        prefix = thumbnail.rsplit("/", 3)[0]
        assert client.get(f"{prefix}/{wrong}").status_code == 404


@pytest.mark.parametrize("name", ["user-011", HOSTILE[1]])
def test_the_code_on_the_page_of_an_item_draws_it_again(
    client: TestClient, snapshot: Snapshot, name: str
) -> None:
    items = snapshot.for_user(name)
    html = client.get("/item", params={"user": name, "id": items["item_id"][0].as_py()}).text
    code = unescape(html.partition("<code>")[2].partition("</code>")[0])
    values: dict[str, Any] = {}
    exec(code, values)
    assert values["images"].table["image"][0].as_py()["bytes"] == snapshot.images(items)[0]


def test_liked_items_stand_beside_generated_ones(client: TestClient, snapshot: Snapshot) -> None:
    html = client.get("/user", params={"id": HOSTILE[0]}).text
    assert "Liked: 2" in html
    assert "liked &lt;b&gt;0&lt;/b&gt;" in html
    assert "disliked" not in html
    first, second = links(html.replace("src=", "href="), "/real?")
    assert [client.get(link).content for link in (first, second)] == snapshot.images(
        snapshot.items().slice(0, 2)
    )
    assert client.get("/real", params={"id": "unknown"}).status_code == 404
    assert "No likes in the given interactions" in client.get("/user", params={"id": "user-001"}).text


def test_a_filter_shows_exactly_the_items_that_match(client: TestClient, snapshot: Snapshot) -> None:
    items = snapshot.items()
    limit = sorted(items["nearest_similarity"].to_pylist())[10]
    expected = items.filter(pc.greater_equal(items["nearest_similarity"], float(f"{limit:g}")))
    shown, pages, page = [], [], f"/items?filter=near&limit={limit:g}"
    while page:
        html = client.get(page).text
        shown += [link.rpartition("id=")[2] for link in links(html, "/item?")]
        pages.append(len(pictures(html)))
        page = next(iter([link for link in links(html, "/items?") if "after=" in link]), "")
    assert sorted(shown) == sorted(expected["item_id"].to_pylist())
    assert pages == [60, 60, len(shown) - 120]
    assert "No such item." in client.get("/items", params={"filter": "flagged"}).text
    assert "No item failed." in client.get("/items", params={"filter": "failed"}).text
    assert client.get("/items", params={"filter": "nice"}).status_code == 404
    assert client.get("/items?filter=near&limit=nan&after=x.y&start=-3").status_code == 200


def test_a_filter_reads_nothing_where_statistics_say_that_nothing_matches(
    snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A column without a value, and an unsafe flag that no row has."""
    tables = Tables(snapshot)
    monkeypatch.setattr(Tables, "matches_in", lambda *_: pytest.fail("a row group was read"))
    for name in ("likely", "flagged"):  # the prior has no selector, so no item has a like probability
        matches = tables.matching(filter_of(name, 1.0), ITEM, Position())
        assert (matches.rows.num_rows, matches.after) == (0, None)
    monkeypatch.setattr(tables_module, "FILES_PER_PAGE", 2)
    visited, position = 0, Position()
    while position is not None:
        position = tables.matching(filter_of("flagged", 0.0), ITEM, position).after
        visited += 1
    assert visited == -(-len(tables.files["items"]) // 2)


def test_failed_items_are_listed_with_their_reason(tmp_path: Path, tiny_decoder: DecoderSettings) -> None:
    config = write_night(tmp_path, tiny_decoder, ["a", "b"])
    prepared = prepare(config, break_first=True)
    assembled(config, prepared, error_budget=1.0)
    publish(config.catalog, prepared.run)
    client = client_of(Gallery(source=Source(config.catalog)))
    html = client.get("/items", params={"filter": "failed"}).text
    assert "image_embeds is not finite" in html
    (user,) = links(html, "/user?")
    assert "1 failed" in client.get(user).text


def test_a_snapshot_shows_its_counts_and_what_changed(client: TestClient, snapshot: Snapshot) -> None:
    html = client.get("/snapshot").text
    for name, value in (("new", len(NAMES)), ("gone", 0), ("moved", 0)):
        assert f'<th scope="row">{name}</th><td>{value}</td>' in html
    assert snapshot.run_id in html
    assert "published" in html


def test_the_map_shows_each_item_once_and_similar_ones_close(client: TestClient) -> None:
    html = client.get("/map").text
    shown = [link.rpartition("id=")[2] for link in links(html, "/item?")]
    assert len(shown) == len({*shown}) == len(NAMES)
    assert html.count("<image href=") == len(NAMES)
    directions = np.random.default_rng(0).standard_normal((2, D))
    groups = np.repeat([0, 1], 60)
    noise = np.random.default_rng(1).standard_normal((120, D))
    positions = np.array(cells(directions[groups] + 0.1 * noise))
    assert len({tuple(cell) for cell in positions.tolist()}) == 120
    apart = np.linalg.norm(positions[:60].mean(0) - positions[60:].mean(0))
    assert apart > 8
    assert cells(np.empty((0, D))) == []
    assert len({*cells(np.ones((3, D)))}) == 3


def test_a_publication_is_followed_and_open_pages_stay_whole(
    night: GenerateConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    shutil.copytree(Path(night.catalog).parent, tmp_path, dirs_exist_ok=True)
    config = night.model_copy(
        update={"catalog": str(tmp_path / "catalog"), "request": str(tmp_path / "request.parquet")}
    )
    client = client_of(Gallery(source=Source(config.catalog)))
    before = read_catalog(config.catalog)
    html = client.get("/").text
    assert f"run {before.run_id}" in html
    refreshed = config.model_copy(
        update={"run_date": date(2031, 1, 1), "num_images": 2}  # another night, with one more image per user
    )
    snapshot_of(refreshed)
    after = read_catalog(config.catalog)
    assert [client.get(source).status_code for source in pictures(html)] == [200] * 60
    assert f"run {after.run_id}" in client.get("/").text

    pinned = {"date": before.manifest.run_date, "run": before.run_id}
    html = client.get("/", params=pinned).text
    assert f"run {before.run_id}" in html
    assert "pinned" in html
    assert all("run=" + before.run_id in link for link in links(html, "/user?"))
    against = f"{before.manifest.run_date}/{before.run_id}"
    html = client.get("/user", params={"id": "user-003", "against": against}).text
    assert len(pictures(html)) == 2 + 1
    html = client.get("/compare", params={"against": against}).text
    assert len(links(html, "/user?")) == 20
    assert len(pictures(html)) == 20 * 3
    assert [client.get(source).status_code for source in pictures(html)] == [200] * 60
    shutil.rmtree(Path(config.catalog) / before.path)
    assert client.get("/", params=pinned).status_code in (200, 404)  # a snapshot that is open may stay so
    fresh = client_of(Gallery(source=Source(config.catalog)))
    gone = fresh.get("/", params=pinned)
    assert (gone.status_code, "was removed or never finished" in gone.text) == (404, True)


def test_two_catalogs_are_compared(gallery: Gallery, tmp_path: Path, tiny_decoder: DecoderSettings) -> None:
    config = write_night(tmp_path, tiny_decoder, ["user-000", "other"])
    snapshot_of(config)
    client = client_of(Gallery(source=gallery.source, other=Source(config.catalog)))
    start = sorted(NAMES).index("user-000") // 20 * 20
    html = client.get("/compare", params={"start": start}).text
    assert len(pictures(html)) == 20 + 1
    (other,) = [source for source in pictures(html) if source.startswith("/picture/other/")]
    assert client.get(other).content != client.get(other.replace("other", "this", 1)).content
    assert client_of(gallery).get("/compare").status_code == 404


def test_a_catalog_without_a_snapshot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing is published there"):
        Source(str(tmp_path))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "127.0.0.1:8400"}, 200),
        ({"host": "localhost"}, 200),
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1.evil.example:8400"}, 421),
        ({"host": ""}, 421),
        ({"host": "[broken"}, 421),
        ({"host": "localhost", "origin": "http://localhost"}, 200),
        ({"host": "localhost", "origin": "http://evil.example"}, 403),
        ({"host": "localhost", "origin": "null"}, 403),
        ({"host": "localhost:8400", "origin": "http://localhost:8401"}, 403),
        ({"host": "localhost", "origin": "http://["}, 403),
        ({"host": "localhost", "sec-fetch-site": "cross-site", "sec-fetch-dest": "image"}, 403),
        (
            {
                "host": "localhost",
                "sec-fetch-site": "cross-site",
                "sec-fetch-mode": "navigate",
                "sec-fetch-dest": "document",
            },
            200,
        ),
    ],
)
def test_only_this_host_and_its_pages_are_answered(
    client: TestClient, headers: dict[str, str], status: int
) -> None:
    for path in ("/", "/static/gallery.css", "/snapshot"):
        assert client.get(path, headers=headers).status_code == status


def test_beyond_this_machine_and_behind_a_name_a_token_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = [
        listen(*arguments)
        for arguments in (
            ("127.0.0.1", 0, []),
            ("127.0.0.2", 0, []),
            ("127.0.0.1", 0, ["gallery.example"]),
            ("0.0.0.0", 0, []),
        )
    ]
    assert [listening.token is None for listening in opened] == [True, True, False, False]
    assert "127.0.0.2" in opened[1].hosts
    assert opened[2].url.startswith("http://gallery.example:")
    assert {"localhost", "0.0.0.0"} <= {*opened[3].hosts}
    monkeypatch.setenv("REBECA_GALLERY_TOKEN", "a+b&c")
    fixed = listen("127.0.0.1", 0, [])
    assert (fixed.token, fixed.url.partition("?")[2]) == ("a+b&c", "token=$REBECA_GALLERY_TOKEN")
    port = fixed.server.getsockname()[1]
    for host in ("127.0.0.1", "a..b"):
        with pytest.raises(InputError, match=f"gallery: {host}:{port} cannot be opened"):
            listen(host, port, [])
    for listening in (*opened, fixed):
        listening.server.close()


def test_an_address_to_listen_on_has_a_host_and_a_port() -> None:
    assert parse_bind("127.0.0.1:0") == ("127.0.0.1", 0)
    assert parse_bind("localhost") == ("localhost", 8400)
    assert parse_bind("[::1]:81") == ("::1", 81)
    for bind in ("", ":80", "host:port", "host:99999", "host/path", "[::1"):
        with pytest.raises(InputError, match="is no HOST:PORT; give such as 127.0.0.1:8400"):
            parse_bind(bind)


def test_a_token_opens_the_gallery_once_and_a_cookie_keeps_it_open(gallery: Gallery) -> None:
    client = client_of(gallery, token="secret")
    assert client.get("/").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    opened = client.get("/?token=secret")
    assert (opened.status_code, opened.headers["location"]) == (303, "/")
    assert "HttpOnly" in opened.headers["set-cookie"]
    assert client.get("/").status_code == 200
    client.cookies.clear()
    assert client.get("/", headers={"cookie": "rebeca_gallery=wrong"}).status_code == 401


def test_a_store_that_is_gone_is_a_page_that_says_so(
    night: GenerateConfig, proxy: FaultyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    monkeypatch.setattr(source_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    filesystem = fsspec.filesystem("s3")
    filesystem.put(f"{night.catalog}/", "rebeca/gallery/catalog/", recursive=True)
    client = client_of(Gallery(source=Source("s3://rebeca/gallery/catalog")))
    html = client.get("/").text
    assert len(pictures(html)) == 60
    assert client.get(pictures(html)[0]).status_code == 200
    proxy.misbehave(forever("error"))
    gone = client.get("/")
    assert (gone.status_code, "The store does not answer" in gone.text) == (503, True)
    proxy.misbehave([])
    assert client.get("/").status_code == 200
