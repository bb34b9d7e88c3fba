"""OpenTelemetry spans of runs, stages and steps, where an OTLP endpoint is set.

Attributes are names, counts and outcomes of a run, and never the id of a user.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import rebeca_ray
from rebeca_ray.errors import describe
from rebeca_ray.telemetry.sending import Sender

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

log = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
SECONDS_TO_FLUSH = 5


def exporter() -> "SpanExporter | None":
    """Return the exporter that the standard variables ask for; None without an endpoint, or its package."""
    if not any(os.environ.get(name) for name in ENDPOINTS):
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError:
        log.warning("traces: no exporter is installed; install rebeca-ray[traces], or unset %s", ENDPOINTS[0])
        return None
    return OTLPSpanExporter()


@cache
def provider() -> "TracerProvider | None":
    """Return the source of all spans of this process, None if traces are off or their variables are wrong."""
    try:
        return source_of(exporter())
    except Exception as error:  # of any kind, by a variable that the library refuses
        log.warning("traces: off (%s: %s); check the OTEL_ variables", type(error).__name__, describe(error))
        return None


def source_of(chosen: "SpanExporter | None") -> "TracerProvider | None":
    """Return the source of spans that an exporter sends."""
    if chosen is None:
        return None
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.name": "rebeca_ray", "service.version": rebeca_ray.__version__})
    tracers = TracerProvider(resource=resource, shutdown_on_exit=False)  # which would wait for a lost server
    tracers.add_span_processor(BatchSpanProcessor(chosen))
    return tracers


@contextmanager
def span(name: str) -> Iterator[dict[str, str | int]]:
    """Record the block as a span. The block fills in the span's attributes."""
    attributes: dict[str, str | int] = {}
    tracers = provider()
    if tracers is None:
        yield attributes
        return
    from opentelemetry.trace import StatusCode

    tracer = tracers.get_tracer("rebeca_ray")
    # The message of an exception may name a user.
    with tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False
    ) as recorded:
        try:
            yield attributes
        except BaseException as error:
            recorded.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            recorded.set_attributes({f"rebeca.{key}": value for key, value in attributes.items()})


def flush() -> None:
    """Send the spans so far, within SECONDS_TO_FLUSH."""
    if tracers := provider():
        sender = Sender("traces")
        sender.send(lambda: tracers.force_flush(1000 * SECONDS_TO_FLUSH))
        sender.close(SECONDS_TO_FLUSH)
