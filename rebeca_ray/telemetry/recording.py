"""Recording: a metric's values go to Ray, which exports them on the node of the process.

A process records while Ray runs in it, and does nothing otherwise.
"""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Literal

log = logging.getLogger(__name__)

# Ray drops a gauge that was not set for two of its reports: 20 s by default, and 2 s at least.
SECONDS_BETWEEN_REFRESHES = 1.0


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. Each of its labels is an enum, and has the enum's name."""

    kind: Literal["counter", "gauge", "histogram"]
    name: str
    meaning: str
    labels: tuple[type[StrEnum], ...] = ()
    bounds: tuple[float, ...] = ()  # of a histogram's buckets

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(label.__name__.lower() for label in self.labels)

    def record(self, value: float, *words: str) -> None:
        """Add to a counter, set a gauge, or observe a value, with a word for each label. Never raises."""
        try:
            if not is_recording() or (self.kind == "counter" and not value):
                return
            tags = {key: label(word).value for key, label, word in self.tags_of(words)}
            if self.kind == "gauge":
                with refreshing:
                    latest[self, words] = value
                    instrument(self).set(float(value), tags)
                start_refreshing()
                return
            verb = "inc" if self.kind == "counter" else "observe"
            getattr(instrument(self), verb)(float(value), tags)
        except Exception as error:  # of any kind: no report may fail a run
            log.debug("metric %s was not recorded: %s: %s", self.name, type(error).__name__, error)

    def tags_of(self, words: tuple[str, ...]) -> Iterator[tuple[str, type[StrEnum], str]]:
        return zip(self.keys, self.labels, words, strict=True)


def is_recording() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@cache
def instrument(metric: Metric) -> Any:
    """Return Ray's object for a metric."""
    from ray.util import metrics

    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.meaning, list(metric.bounds), metric.keys)
    make = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return make(metric.name, metric.meaning, metric.keys)


latest: dict[tuple[Metric, tuple[str, ...]], float] = {}  # the gauges of this process
refreshing = threading.RLock()  # else an old value might be set after a new one


@cache
def start_refreshing() -> None:
    """Start the thread that sets every gauge again at intervals."""

    def refresh() -> None:
        while True:
            time.sleep(SECONDS_BETWEEN_REFRESHES)
            with refreshing:
                for (gauge, words), value in list(latest.items()):
                    gauge.record(value, *words)

    threading.Thread(target=refresh, name="gauges", daemon=True).start()
