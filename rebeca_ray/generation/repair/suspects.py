"""Suspects: rows that kill the process that renders them, by a crash or for want of memory.

Ray starts a killed actor again and gives it the same rows, for ever. So an actor that Ray has started again
notes the rows of each batch before it draws them, and removes the note afterwards. A note that stays tells of
a death. Rows of DEATHS such notes are drawn alone; one that has killed DEATHS times alone is not drawn again
in this attempt.

Before the first death nothing is noted, so a run without deaths pays nothing.
"""

import secrets
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pyarrow as pa

from rebeca_ray import identity, schemas
from rebeca_ray.storage.filesystem import delete, join, list_files
from rebeca_ray.storage.records import read_record, write_record

DEATHS = 2  # with the same rows noted
REASON = f"killed its process {DEATHS} times when it was drawn alone: a crash, or too little memory"


class Suspects:
    """The notes of the processes that died while they rendered in an attempt, below `uri`."""

    def __init__(self, uri: str, *, watchful: bool) -> None:
        self.uri = uri
        self.deaths: Counter[str] = Counter()  # by item
        self.deaths_alone: Counter[str] = Counter()
        for file in list_files(uri, ".json"):
            item_ids = (read_record(file) or {"item_ids": []})["item_ids"]
            self.deaths.update(item_ids)
            if len(item_ids) == 1:
                self.deaths_alone.update(item_ids)
        self.watchful = watchful or bool(self.deaths)
        self.one_at_a_time = threading.Lock()  # a death tells of all rows that are noted

    def render(self, batch: pa.Table, render: Callable[[pa.Table], pa.Table]) -> pa.Table:
        """Return the rows of `schemas.IMAGES` of a batch, in its order: `render` draws them.

        Suspects are drawn alone; one that kills alone gets an error instead of an image.
        """
        if not self.watchful:
            return render(batch)
        with self.one_at_a_time:
            return self.render_noted(batch, render)

    def render_noted(self, batch: pa.Table, render: Callable[[pa.Table], pa.Table]) -> pa.Table:
        item_ids = batch["item_id"].to_pylist()
        alone = np.array([self.deaths[item] >= DEATHS for item in item_ids])
        groups = [np.flatnonzero(~alone), *np.flatnonzero(alone)[:, None]]
        groups = [rows for rows in groups if len(rows)]
        images = []
        for rows in groups:
            part = batch.take(pa.array(rows))
            if self.deaths_alone[item_ids[rows[0]]] >= DEATHS:
                images.append(failed(part))
                continue
            with self.noted(part["item_id"].to_pylist()):
                images.append(render(part))
        order = np.argsort(np.concatenate(groups), kind="stable")
        return pa.concat_tables(images).take(pa.array(order))

    @contextmanager
    def noted(self, item_ids: list[str]) -> Iterator[None]:
        """Note some items for the time that they are drawn. The note stays if the process dies."""
        note = join(self.uri, f"{secrets.token_hex(8)}.json")
        write_record({"item_ids": item_ids}, note)
        try:
            yield
        finally:
            delete(note)


def failed(batch: pa.Table) -> pa.Table:
    """Return rows of `schemas.IMAGES` without an image, and with the reason."""
    rows = [
        {"item_id": item, "seed": identity.image_seed(item), "error": REASON}
        for item in batch["item_id"].to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=schemas.IMAGES)


def was_started_again() -> bool:
    """Return whether Ray has started this actor again, after its process died."""
    import ray

    if not ray.is_initialized():
        return False
    with warnings.catch_warnings():  # of a method that Ray itself calls
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)
