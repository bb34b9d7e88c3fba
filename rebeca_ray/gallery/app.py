"""The pages of the gallery: routes, and the templates that they fill.

request -> snapshot (the published one, or that of the address) -> rows -> page

Every handler is a plain function, so that Starlette runs it in a thread: a slow store delays its page alone.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.catalog.snapshots import list_snapshots
from rebeca_ray.errors import StorageError, UserError, redacted
from rebeca_ray.gallery import views
from rebeca_ray.gallery.guard import Guard
from rebeca_ray.gallery.map import COLUMNS, ROWS, map_of
from rebeca_ray.gallery.people import Histories, RealItems
from rebeca_ray.gallery.pictures import (
    DETAILS,
    FOR_A_WHILE,
    FOR_EVER,
    media_type,
    picture_response,
    read_picture,
    read_row,
)
from rebeca_ray.gallery.source import Source, is_one_name
from rebeca_ray.gallery.steering import Steering, votes_of
from rebeca_ray.gallery.tables import PAGE, Position, Tables

USERS_COMPARED = 20  # per page
IMAGES_COMPARED = 8  # per user and side
FORM_BYTES = 64 * 2**10


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Everything that the pages show: a catalog, and what is given beside it."""

    source: Source
    other: Source | None = None  # to compare with
    histories: Histories | None = None
    real_items: RealItems | None = None
    config: str | None = None  # the file of the run's config, which draws an item again
    steering: Steering | None = None


def build_app(gallery: Gallery, hosts: list[str], token: str | None = None) -> Starlette:
    """Return the gallery as an ASGI application that answers for some host names."""
    pages = Pages(gallery)
    routes = [
        Route("/", pages.users),
        Route("/user", pages.user),
        Route("/item", pages.item),
        Route("/items", pages.items),
        Route("/snapshot", pages.snapshot),
        Route("/compare", pages.compare),
        Route("/map", pages.map),
        Route("/picture/{side}/{date}/{run_id}/{file}/{row}/{kind}", pages.picture),
        Route("/real", pages.real),
        Route("/steered/{token}/{number}", pages.steered),
        Route("/feedback", pages.feedback, methods=["POST"]),
        Mount("/static", StaticFiles(directory=Path(__file__).parent / "static")),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, hosts=hosts, token=token)],
        exception_handlers={UserError: pages.failure, HTTPException: pages.failure},
    )


class Pages:
    """The handlers, which share the gallery and its templates."""

    def __init__(self, gallery: Gallery) -> None:
        self.gallery = gallery
        self.templates = Environment(
            loader=PackageLoader("rebeca_ray.gallery", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
        )
        self.templates.globals |= {"link": link, "picture": picture_link, "population": POPULATION_USER}
        self.templates.filters |= {"number": "{:,}".format, "share": as_share, "value": as_value}

    def tables(self, request: Request) -> Tables:
        """Return the tables of the snapshot that the address names, by default of the published one."""
        return self.tables_of(request.query_params)

    def tables_of(self, values: Mapping[str, str]) -> Tables:
        date, run_id = (values.get(name, "") for name in ("date", "run"))
        if is_one_name(date) and is_one_name(run_id):
            return self.gallery.source.at(date, run_id)
        return self.gallery.source.current()

    def against(self, request: Request) -> tuple[str, Tables] | None:
        """Return the snapshot to compare with, and its side: one of this catalog, or of the other."""
        date, _, run_id = request.query_params.get("against", "").partition("/")
        if is_one_name(date) and is_one_name(run_id):
            return "this", self.gallery.source.at(date, run_id)
        return ("other", self.gallery.other.current()) if self.gallery.other else None

    def page(self, template: str, request: Request, tables: Tables | None, /, **values: Any) -> Response:
        pinned = {
            name: request.query_params[name] for name in ("date", "run") if name in request.query_params
        }
        html = self.templates.get_template(template).render(
            gallery=self.gallery,
            tables=tables,
            manifest=tables and tables.snapshot.manifest,
            pinned=pinned,
            page=template.partition(".")[0],
            **values,
        )
        return HTMLResponse(html, headers={"Cache-Control": "no-store"})

    def users(self, request: Request) -> Response:
        """Show users, 60 per page or those whose ids begin with a text, each with the best image."""
        tables, text = self.tables(request), request.query_params.get("q", "")
        start, total = number(request, "start"), tables.num_rows("users")
        if text:
            rows = tables.users_that_begin_with(text, views.USER)
        else:
            start = min(start, max(0, total - 1)) // PAGE * PAGE
            rows = tables.page("users", start, views.USER)
        users = views.with_best_item(tables, rows)
        return self.page(
            "users.html.j2", request, tables, users=users, text=text, start=start, total=total, size=PAGE
        )

    def user(self, request: Request) -> Response:
        """Show a user: liked items beside generated ones, and those of another snapshot if one is named."""
        tables, user_id = self.tables(request), request.query_params.get("id", "")
        row, compared = views.user_row(tables, user_id), self.against(request)
        if row is None and user_id != POPULATION_USER:
            raise HTTPException(404, f"user {user_id!r} is not in this snapshot")
        histories = self.gallery.histories
        num_likes, liked = histories.liked_by(user_id) if histories and row else (0, [])
        steering = self.gallery.steering
        return self.page(
            "user.html.j2",
            request,
            tables,
            user_id=user_id,
            row=row,
            items=views.items_of(tables, user_id),
            changes=views.changes_of(tables, user_id) if tables.snapshot.manifest.previous_run_id else {},
            errors=tables.snapshot.table("errors", None, [user_id]).to_pylist(),
            liked=liked,
            num_likes=num_likes,
            against=compared and (compared[0], compared[1], views.items_of(compared[1], user_id)),
            steered=steering.look(tables, row, request.query_params) if steering and row else None,
            saved=number(request, "saved"),
        )

    def steered(self, request: Request) -> Response:
        """Return an image that was drawn for a person who steers."""
        values, steering = request.path_params, self.gallery.steering
        number = whole(values["number"])
        picture = steering.picture(values["token"], number) if steering and number is not None else None
        return picture_response(picture, FOR_A_WHILE)

    async def feedback(self, request: Request) -> Response:
        """Save the votes of a form, and lead back to the user's page."""
        form = dict(parse_qsl((await body_of(request)).decode(errors="replace")))
        return await run_in_threadpool(self.save, form)

    def save(self, form: dict[str, str]) -> Response:
        steering, user_id, votes = self.gallery.steering, form.get("id", ""), votes_of(form)
        tables = self.tables_of(form)
        if steering is None or views.user_row(tables, user_id) is None:
            raise HTTPException(404, f"user {user_id!r} is not in this snapshot")
        known = {item["item_id"] for item in views.items_of(tables, user_id)}
        if unknown := [item for item in votes if item not in known]:
            raise HTTPException(404, f"item {unknown[0]!r} of user {user_id!r} is not in this snapshot")
        if not votes:
            raise HTTPException(422, "nothing is voted on: choose more or less for an image first")
        steering.save(user_id, votes)
        pinned = {name: value for name, value in form.items() if name in ("date", "run")}
        return RedirectResponse(link("/user", pinned, id=user_id, saved=len(votes)), status_code=303)

    def item(self, request: Request) -> Response:
        """Show an item: its image and its row."""
        tables = self.tables(request)
        user_id, item_id = (request.query_params.get(name, "") for name in ("user", "id"))
        row = views.item_row(tables, user_id, item_id)
        if row is None:
            raise HTTPException(404, f"item {item_id!r} of user {user_id!r} is not in this snapshot")
        details = read_row(tables, row["image_file"], row["image_row"], DETAILS) or {}
        return self.page("item.html.j2", request, tables, item=row, details=details)

    def items(self, request: Request) -> Response:
        """Show items that a filter chooses, page by page."""
        tables, name = self.tables(request), request.query_params.get("filter", "likely")
        if name not in views.FILTERS:
            raise HTTPException(404, f"filter {name!r}: there are {', '.join(views.FILTERS)}")
        limit = fraction(request, "limit", views.LIMITS.get(name, 0.0))
        start = number(request, "start")
        errors, rows, after, total = [], [], None, None
        if name == "failed":
            total = tables.num_rows("errors")
            start = min(start, max(0, total - 1)) // PAGE * PAGE
            errors = tables.page("errors", start, tables.snapshot.schema("errors").names).to_pylist()
        else:
            position = Position.parse(request.query_params.get("after", ""))
            matches = tables.matching(views.filter_of(name, limit), views.ITEM, position)
            rows, after = matches.rows.to_pylist(), matches.after
        return self.page(
            "items.html.j2",
            request,
            tables,
            name=name,
            limit=limit,
            items=rows,
            after=after,
            errors=errors,
            start=start,
            total=total,
            size=PAGE,
            filters=views.FILTERS,
            limits=views.LIMITS,
        )

    def snapshot(self, request: Request) -> Response:
        """Show a snapshot: counts, figures of the gate, changes since the one before, and all others."""
        tables = self.tables(request)
        return self.page(
            "snapshot.html.j2",
            request,
            tables,
            values=tables.snapshot.manifest.model_dump(),
            changes=tables.changes,
            snapshots=list_snapshots(self.gallery.source.root)[::-1],
            published=self.gallery.source.current().snapshot.run_id,
        )

    def compare(self, request: Request) -> Response:
        """Show users with their items in two snapshots side by side."""
        tables, compared = self.tables(request), self.against(request)
        if compared is None:
            raise HTTPException(
                404, "nothing to compare with: choose a snapshot, or start the gallery with --other"
            )
        side, other = compared
        total = tables.num_rows("users")
        start = min(number(request, "start"), max(0, total - 1)) // USERS_COMPARED * USERS_COMPARED
        names = tables.page("users", start, ["user_id"], USERS_COMPARED)["user_id"].to_pylist()
        both = (
            [
                [
                    [item for item in items if item["user_id"] == name][:IMAGES_COMPARED]
                    for items in (
                        tables.snapshot.items(views.ITEM, names).to_pylist(),
                        other.snapshot.items(views.ITEM, names).to_pylist(),
                    )
                ]
                for name in names
            ]
            if names
            else []
        )
        return self.page(
            "compare.html.j2",
            request,
            tables,
            side=side,
            other=other,
            users=list(zip(names, both, strict=True)),
            start=start,
            total=total,
            size=USERS_COMPARED,
            against=request.query_params.get("against", ""),
        )

    def map(self, request: Request) -> Response:
        """Show a sample of the items on a map."""
        tables = self.tables(request)
        return self.page("map.html.j2", request, tables, cells=map_of(tables), columns=COLUMNS, rows=ROWS)

    def picture(self, request: Request) -> Response:
        """Return an image or thumbnail of a run, which never changes."""
        values = request.path_params
        source = self.gallery.other if values["side"] == "other" else self.gallery.source
        file, row = whole(values["file"]), whole(values["row"])
        if source is None or file is None or row is None or values["kind"] not in ("image", "thumbnail"):
            return Response(status_code=404)
        tables = source.at(values["date"], values["run_id"])
        picture = read_picture(tables, file, row, values["kind"])
        if picture is None and values["kind"] == "thumbnail":  # catalogs may have none
            picture = read_picture(tables, file, row, "image")
        return picture_response(picture, FOR_EVER)

    def real(self, request: Request) -> Response:
        """Return the image of a real item."""
        items = self.gallery.real_items
        image = items.image(request.query_params.get("id", "")) if items else None
        return picture_response((image, media_type(image)) if image else None, FOR_A_WHILE)

    def failure(self, request: Request, error: Exception) -> Response:
        """Show an error as a page: 503 if the store does not answer, 404 for anything that is not there."""
        status = 503 if isinstance(error, StorageError) else getattr(error, "status_code", 404)
        text = error.detail if isinstance(error, HTTPException) else redacted(str(error))
        response = self.page("error.html.j2", request, None, message=text, status=status)
        response.status_code = status
        return response


async def body_of(request: Request) -> bytes:
    """Return the body of a request. Raises HTTPException for more than FORM_BYTES."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > FORM_BYTES:
            raise HTTPException(413, f"the form has more than {FORM_BYTES:,} bytes")
    return body


def link(path: str, pinned: dict[str, str] | None = None, **query: Any) -> str:
    """Return a link within the gallery, for the snapshot that the page is pinned to."""
    values = {**(pinned or {}), **{name: value for name, value in query.items() if value is not None}}
    return f"{path}?{urlencode(values)}" if values else path


def picture_link(tables: Tables, item: views.Row, kind: str = "thumbnail", side: str = "this") -> str:
    """Return the address of an item's image, which names the run and the row that hold it."""
    manifest, row = tables.snapshot.manifest, f"{item['image_file']}/{item['image_row']}"
    return f"/picture/{side}/{manifest.run_date}/{manifest.run_id}/{row}/{kind}"


def as_share(value: float | None) -> str:
    """Return a probability or cosine with two digits, a dash for none."""
    return "–" if value is None else f"{value:.2f}"


def as_value(value: Any) -> str:
    """Return a value of a table's cell: whole numbers in groups, others with four digits, a dash for none."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def number(request: Request, name: str) -> int:
    """Return a whole number of the address, 0 for any other text."""
    return whole(request.query_params.get(name, "")) or 0


def whole(text: str) -> int | None:
    """Return the whole number that a text is, None for any other text and for more than 15 digits."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None


def fraction(request: Request, name: str, default: float) -> float:
    """Return a number of the address, the default for any other text."""
    try:
        value = float(request.query_params.get(name, ""))
    except ValueError:
        return default
    return value if math.isfinite(value) else default
