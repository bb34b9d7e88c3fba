"""Steering on a user's page: votes and sliders in the address, and the images that they give.

address -> votes, settings -> rebeca_ray.halves.steer, one drawing at a time -> images, kept for a while

Nothing is written but votes that a person saves, to the file given at the start.
"""

import logging
import math
import secrets
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from rebeca_ray import schemas
from rebeca_ray.catalog.layout import POPULATION_USER
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.config.load import parse_config
from rebeca_ray.data.votes import append_votes
from rebeca_ray.errors import InputError, describe, redacted
from rebeca_ray.gallery.people import Histories
from rebeca_ray.gallery.pictures import media_type
from rebeca_ray.gallery.tables import Tables
from rebeca_ray.gallery.views import Row
from rebeca_ray.storage.failures import user_error

if TYPE_CHECKING:
    from rebeca_ray.halves.steer import SteeredUser, Steerer

log = logging.getLogger(__name__)

VOTE = "vote."  # before an item's id, as the name of a field
VOTES: Mapping[str, bool] = {"more": True, "less": False}
DRAWINGS = 32  # whose images are kept
SAME = "Without votes and changes, these are the published images."
COLD_START = "Published, this user shares the images of the population. These are drawn for the user alone."
NOT_SAME = (
    "These differ from the published images: models, ratings, settings or the number of images are not those "
    "of the run, or the user shares an image of another user."
)


@dataclass(frozen=True, kw_only=True)
class Slider:
    """One setting that a person may change."""

    name: str  # the key of the config
    label: str
    low: float
    high: float
    step: float | Literal["any"]
    value: float
    is_default: bool


@dataclass(frozen=True, kw_only=True)
class DrawnImage:
    """One drawn image: its address, or None with an error or after the safety policy dropped it."""

    rank: int
    like_probability: float | None
    error: str | None
    address: str | None


@dataclass(frozen=True, kw_only=True)
class Steered:
    """The state of a user's page: votes, sliders, and the drawn images or the reason for none."""

    votes: dict[str, bool]
    is_open: bool
    can_vote: bool = False
    sliders: list[Slider] = field(default_factory=list)
    images: list[DrawnImage] = field(default_factory=list)
    note: str | None = None  # about images without a vote or a changed setting
    message: str | None = None


class Steering:
    """Draws for the pages of users. The models are loaded when the first person draws."""

    def __init__(self, config: GenerateConfig, histories: Histories | None, feedback: str | None) -> None:
        self.config, self.histories, self.feedback = config, histories, feedback
        self.lock = threading.Lock()
        self.pictures: OrderedDict[str, list[bytes]] = OrderedDict()

    @cached_property
    def steerer(self) -> "Steerer":
        from rebeca_ray.halves.steer import Steerer  # loads torch, which no other page needs

        return Steerer(self.config)

    def look(self, tables: Tables, user: Row, query: Mapping[str, str]) -> Steered:
        """Return the state of a user's page, with new images if the address asks for them."""
        steered = Steered(votes=votes_of(query), is_open="draw" in query)
        if not steered.is_open:
            return steered
        from rebeca_ray.halves.steer import Settled

        with self.lock:
            try:
                steerer = self.steerer
                sliders = sliders_of(steerer, query)
                steered = replace(steered, sliders=sliders, can_vote=steerer.reads_histories)
                values = {slider.name: slider.value for slider in sliders if not slider.is_default}
                settled = parse_config(Settled, values, where="steering")
                steered_user = self.steered_user(tables, user)
                drawn = steerer.draw(steered_user, steered.votes, settled)
            except Exception as error:
                # A model may fail too, such as for want of memory. The page says so, the log says more.
                reason = user_error(error)
                if reason is None:
                    log.exception("steering a user failed")
                return replace(steered, message=redacted(str(reason or describe(error))))
            note = None
            if not steered.votes and all(slider.is_default for slider in sliders):
                published = steered_user.items["item_id"].to_pylist()
                is_same = {*drawn["item_id"].to_pylist()} <= {*published}
                note = SAME if is_same else COLD_START if user["cold_start"] else NOT_SAME
            return replace(steered, images=self.keep(drawn), note=note)

    def keep(self, drawn: pa.Table) -> list[DrawnImage]:
        """Keep the images for the browser; return the other columns with their addresses."""
        token = secrets.token_urlsafe(12)
        images = [image["bytes"] if image else b"" for image in drawn["image"].to_pylist()]
        self.pictures[token] = images
        while len(self.pictures) > DRAWINGS:
            self.pictures.popitem(last=False)
        return [
            DrawnImage(**row, address=f"/steered/{token}/{number}" if images[number] else None)
            for number, row in enumerate(drawn.select(["rank", "like_probability", "error"]).to_pylist())
        ]

    def steered_user(self, tables: Tables, user: Row) -> "SteeredUser":
        """Return a row of `users` with the ratings and the generated items of that user."""
        from rebeca_ray.halves.steer import SteeredUser

        user_id, prior = user["user_id"], self.steerer.loaded.prior
        kind = schemas.embedded_items(prior.scaler.embed_dim)
        items, manifest = kind.empty_table(), tables.snapshot.manifest
        of_another_clip = prior.clip and manifest.clip_fingerprint and manifest.clip_fingerprint != prior.clip
        if manifest.embed_dim == prior.scaler.embed_dim and not of_another_clip:
            names = ["user_id", *kind.names]
            items = tables.snapshot.items(names, [user_id, POPULATION_USER]).select(kind.names).cast(kind)
        no_ratings = schemas.INTERACTIONS.empty_table().select(["user_id", "item_id"])
        return SteeredUser(
            user_id=user_id,
            history_digest=user["history_digest"],
            generation=user["generation"],
            ratings=self.histories.ratings_of(user_id) if self.histories else no_ratings,
            items=items,
        )

    def picture(self, token: str, number: int) -> tuple[bytes, str] | None:
        """Return an image that was drawn, with its media type, None if it is kept no longer."""
        images = self.pictures.get(token, [])
        image = images[number] if number < len(images) else b""
        return (image, media_type(image)) if image else None

    def save(self, user_id: str, votes: Mapping[str, bool]) -> None:
        """Append votes to the file of feedback. Raises InputError without one, and as `append_votes` does."""
        if self.feedback is None or self.config.interactions is None:
            raise InputError("feedback: no file is given; start the gallery with --feedback")
        rated = self.histories.ratings_of(user_id)["item_id"].to_pylist() if self.histories else []
        append_votes(self.feedback, user_id, votes, self.config.interactions, rated)


def votes_of(query: Mapping[str, str]) -> dict[str, bool]:
    """Return the votes of an address or a form, by item."""
    return {
        name.removeprefix(VOTE): VOTES[value]
        for name, value in query.items()
        if name.startswith(VOTE) and value in VOTES
    }


def sliders_of(steerer: "Steerer", query: Mapping[str, str]) -> list[Slider]:
    """Return the settings that the prior can follow, at the values of the address or else of the config."""
    from rebeca_ray.halves.steer import Settled

    sampler, selection = steerer.sampler, steerer.config.selection
    sliders = []

    def add(name: str, label: str, low: float, high: float, step: float, value: float | None) -> None:
        assert value is not None  # of a resolved sampler
        on_grid = abs((value - low) / step - round((value - low) / step)) < 1e-9
        given = number(query.get(name, ""), value)
        sliders.append(
            Slider(
                name=name,
                label=label,
                low=min(low, value),
                high=max(high, value),
                step=step if on_grid else "any",
                value=int(given) if isinstance(value, int) else given,
                is_default=given == value,
            )
        )

    if steerer.has_guidance:
        add("prior_guidance_scale", "Guidance of the prior", 1, 10, 0.25, sampler.prior_guidance_scale)
    if steerer.has_selector:
        scale = sampler.selector_guidance_scale or 5.0
        add(
            "selector_guidance_scale",
            "Guidance by the selector",
            *(0, 4 * scale, scale / 20),
            sampler.selector_guidance_scale,
        )
    if not steerer.is_distilled:
        add("num_inference_steps", "Steps", 3, 30, 1, sampler.num_inference_steps)
    if steerer.reads_histories:
        add("ratings_per_vote", "Ratings per vote", 1, 64, 1, Settled().ratings_per_vote)
    add("candidates_per_item", "Candidates per image", 1, 64, 1, selection.candidates_per_item)
    add("diversity", "Diversity", 0, 1, 0.05, selection.diversity)
    return sliders


def number(text: str, default: float) -> float:
    """Return the number that a text is, a default for any other text."""
    try:
        value = float(text)
    except ValueError:
        return default
    return value if math.isfinite(value) else default
