"""Spans of a night, kept in memory: their names, their parents, and attributes without users."""

from collections.abc import Iterator
from contextlib import suppress

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rebeca_ray import nightly
from rebeca_ray.config.jobs import GenerateConfig, NightlyConfig
from rebeca_ray.generation.pipeline import Generated, generate_catalog
from rebeca_ray.nightly import run_nightly
from rebeca_ray.telemetry import traces
from tests.conftest import NO_GATE, USERS


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(traces, "exporter", lambda: exporter)
    traces.provider.cache_clear()
    yield exporter
    if tracers := traces.provider():
        tracers.shutdown()
    traces.provider.cache_clear()


def parents(spans: tuple[ReadableSpan, ...]) -> dict[str, str | None]:
    names = {span.context.span_id: span.name for span in spans if span.context}
    return {span.name: names[span.parent.span_id] if span.parent else None for span in spans}


def test_a_night_has_a_span_for_each_step_and_stage(
    config: GenerateConfig, exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generate(config: GenerateConfig, since: object) -> Generated:
        return generate_catalog(config, in_process=True)

    monkeypatch.setattr(nightly, "generate_catalog", generate)
    run_nightly(NightlyConfig(generate=config.model_copy(update={"gate": NO_GATE})))
    spans = exporter.get_finished_spans()
    names = [span.name for span in spans]
    assert names == [
        *("histories", "decide", "plan", "test", "render", "assemble"),
        *("generate", "generate", "collect", "nightly"),
    ]
    tree = parents(spans)
    assert {tree[name] for name in names[:6]} == {"generate"}
    assert (tree["collect"], tree["nightly"]) == ("nightly", None)
    root = spans[-1].attributes or {}
    assert root["rebeca.out"] == config.catalog
    text = "".join(span.to_json() for span in spans)
    assert not any(user in text for user in USERS)
    assert spans[0].resource.attributes["service.name"] == "rebeca_ray"


def test_a_variable_that_the_library_refuses_turns_traces_off(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "256")  # less than a batch
    for _ in range(2):
        with traces.span("render") as attributes:
            attributes["images"] = 3
    assert exporter.get_finished_spans() == ()
    (line,) = caplog.messages
    assert line.startswith("traces: off (ValueError: ")
    assert line.endswith("; check the OTEL_ variables")


def test_an_error_marks_its_span_without_its_message(exporter: InMemorySpanExporter) -> None:
    with suppress(ZeroDivisionError), traces.span("render") as attributes:
        attributes["images"] = 3
        raise ZeroDivisionError("user-1 cannot be divided")
    traces.flush()
    (span,) = exporter.get_finished_spans()
    assert (span.status.status_code.name, span.status.description) == ("ERROR", "ZeroDivisionError")
    assert span.attributes == {"rebeca.images": 3}
    assert "user-1" not in span.to_json()


def test_spans_are_off_without_an_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in traces.ENDPOINTS:
        monkeypatch.delenv(name, raising=False)
    traces.provider.cache_clear()
    assert traces.provider() is None
    with traces.span("render") as attributes:
        attributes["images"] = 3
    traces.flush()


def test_an_endpoint_turns_the_standard_exporter_on(monkeypatch: pytest.MonkeyPatch) -> None:
    http = pytest.importorskip("opentelemetry.exporter.otlp.proto.http.trace_exporter")
    monkeypatch.setenv(traces.ENDPOINTS[0], "http://127.0.0.1:9")
    chosen = traces.exporter()
    assert isinstance(chosen, http.OTLPSpanExporter)
    chosen.shutdown()
