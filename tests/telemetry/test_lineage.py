"""OpenLineage events of two nights, received by a server, and a server that hangs, fails or is missing."""

import json
import re
import uuid
from collections.abc import Iterator
from contextlib import suppress
from datetime import date, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.jobs import GenerateConfig, NightlyConfig
from rebeca_ray.config.telemetry import LineageSettings, ReportSettings
from rebeca_ray.errors import InputError
from rebeca_ray.generation.pipeline import generate_catalog
from rebeca_ray.telemetry.attempt import Attempt, night_attempt, training_attempt
from rebeca_ray.telemetry.lineage import TRANSPORTS, URL, dataset_name
from rebeca_ray.telemetry.reporting import reported
from tests.conftest import NO_GATE
from tests.telemetry.receiver import receiving

Event = dict[str, Any]
HAS_CLIENT = pytest.mark.skipif(
    not __import__("importlib.util").util.find_spec("openlineage"), reason="openlineage-python is missing"
)
SCHEMA = re.compile(r"https://openlineage\.io/spec/(facets/)?[\d-]+/\w+\.json#/\$defs/\w+")


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (URL, *TRANSPORTS):
        monkeypatch.delenv(name, raising=False)


def settings_of(url: str, seconds: float = 5) -> ReportSettings:
    return ReportSettings(lineage=LineageSettings(url=url, namespace="shop", timeout_seconds=seconds))


def facets_of(event: Event) -> Iterator[tuple[str, Event]]:
    """Yield all facets of an event by their names."""
    yield from event["run"]["facets"].items()
    yield from event["job"]["facets"].items()
    for dataset in [*event["inputs"], *event["outputs"]]:
        for kind in ("facets", "inputFacets", "outputFacets"):
            yield from dataset.get(kind, {}).items()


def check(event: Event) -> None:
    """Compare an event with the required parts of OpenLineage's schema, and its facets with the client's."""
    assert event["eventType"] in ("START", "COMPLETE", "FAIL", "ABORT")
    assert datetime.fromisoformat(event["eventTime"]).tzinfo is not None
    assert event["schemaURL"] == "https://openlineage.io/spec/2-0-2/OpenLineage.json#/$defs/RunEvent"
    assert event["producer"].startswith("urn:rebeca-ray:")
    assert str(uuid.UUID(event["run"]["runId"])) == event["run"]["runId"]
    assert event["job"]["namespace"] == "shop"
    for dataset in [*event["inputs"], *event["outputs"]]:
        assert dataset["namespace"]
        assert dataset["name"]
    for name, facet in facets_of(event):
        assert facet["_producer"] == event["producer"] or name == "tags"  # which the client adds
        assert SCHEMA.fullmatch(facet["_schemaURL"]), facet
        file = facet["_schemaURL"].rpartition("/")[2]
        if name != "rebeca_counts":
            assert {*facet} - {"_producer", "_schemaURL"} <= fields_of_client(file), name


def fields_of_client(kind: str) -> set[str]:
    """Return the fields of a class of facets of the client library."""
    folder = Path(import_module("openlineage.client.generated").__file__ or "").parent
    for file in folder.glob("*.py"):
        if re.search(rf"^class {kind}\(", file.read_text(), re.MULTILINE):
            facet = getattr(import_module(f"openlineage.client.generated.{file.stem}"), kind)
            return {attribute.name for attribute in facet.__attrs_attrs__}
    raise AssertionError(f"the client has no facet {kind}")


@HAS_CLIENT
def test_two_nights_send_events_with_their_datasets(config: GenerateConfig) -> None:
    with receiving() as receiver:
        config = config.model_copy(update={"gate": NO_GATE, "report": settings_of(receiver.url)})
        first = generate_catalog(config, in_process=True).manifest
        night = night_attempt(NightlyConfig(generate=config), date(2026, 3, 2))
        second_config = config.model_copy(update={"num_images": 2, "run_date": date(2026, 3, 2)})
        with reported(night):
            second = generate_catalog(second_config, in_process=True).manifest
    events = receiver.received
    for event in events:
        check(event)
    assert [(event["job"]["name"], event["eventType"]) for event in sorted(events, key=order_of)] == [
        ("generate", "START"),
        ("generate", "COMPLETE"),
        ("nightly", "START"),
        ("generate", "START"),
        ("generate", "COMPLETE"),
        ("nightly", "COMPLETE"),
    ]
    assert all(by_time(events, run) == ["START", "COMPLETE"] for run in {run_of(event) for event in events})
    by_run = [event for event in events if event["eventType"] == "COMPLETE" and event["outputs"]]
    end = by_run[-1]
    names = {dataset["name"] for dataset in end["inputs"]}
    assert names == {config.prior, config.request, config.items, config.catalog}
    assert {dataset["namespace"] for dataset in end["inputs"]} == {"file"}
    versions = {each["name"]: each["facets"]["version"] for each in end["inputs"] if each["facets"]}
    assert versions[config.catalog]["datasetVersion"] == first.run_id
    assert versions[config.prior]["datasetVersion"] == second.versions["prior"]
    (output,) = end["outputs"]
    assert (output["namespace"], output["name"]) == ("file", config.catalog)
    assert output["facets"]["version"]["datasetVersion"] == second.run_id
    fields = [field["name"] for field in output["facets"]["schema"]["fields"]]
    assert fields == read_catalog(config.catalog).schema("items").names
    statistics = output["outputFacets"]["outputStatistics"]
    assert statistics["rowCount"] == second.counts.published
    assert (statistics["size"], statistics["fileCount"]) == (second.bytes, second.files.rows)
    facets = end["run"]["facets"]
    assert facets["parent"]["run"]["runId"] == night.attempt_id
    assert (facets["parent"]["job"]["namespace"], facets["parent"]["job"]["name"]) == ("shop", "nightly")
    assert facets["nominalTime"]["nominalStartTime"] == "2026-03-02T00:00:00+00:00"
    assert facets["processing_engine"]["name"] == "rebeca_ray"
    assert facets["rebeca_counts"]["counts"] == second.counts.model_dump()
    assert facets["rebeca_counts"]["run_id"] == second.run_id
    assert "user-" not in json.dumps(events)


def run_of(event: Event) -> str:
    return str(event["run"]["runId"])


def by_time(events: list[Event], run: str) -> list[str]:
    """Return the kinds of a run's events in the order of their times."""
    return [event["eventType"] for event in sorted(events, key=order_of) if run_of(event) == run]


def order_of(event: Event) -> datetime:
    """Return the time of an event. The server may receive those of two attempts in another order."""
    return datetime.fromisoformat(event["eventTime"])


def end(attempt: Attempt, error: BaseException | None = None) -> None:
    """Run an attempt that ends at once."""
    with reported(attempt):
        if error:
            raise error


def attempt_of(folder: Path, settings: ReportSettings) -> Attempt:
    return Attempt(
        job="generate",
        settings=settings,
        out="s3://bucket/shop/catalog",
        inputs={"prior": "gs://models/prior", "items": None},
    )


@HAS_CLIENT
def test_failures_and_stops_have_an_event_of_their_kind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rebeca_ray.telemetry.reporting.write_report", lambda *_: False)
    with receiving() as receiver:
        attempt = attempt_of(tmp_path, settings_of(receiver.url))
        with suppress(InputError):
            end(attempt, InputError("request: is empty; give users"))
        with suppress(KeyboardInterrupt):
            end(attempt_of(tmp_path, settings_of(receiver.url)), KeyboardInterrupt())
    for event in receiver.received:
        check(event)
    assert [event["eventType"] for event in receiver.received] == ["START", "FAIL", "START", "ABORT"]
    failure = receiver.received[1]
    assert failure["run"]["facets"]["errorMessage"]["message"] == "request: is empty; give users"
    assert [(each["namespace"], each["name"]) for each in failure["inputs"]] == [("gs://models", "prior")]
    (output,) = failure["outputs"]
    assert (output["namespace"], output["name"]) == ("s3://bucket", "shop/catalog")
    assert "outputStatistics" not in output.get("outputFacets", {})


@HAS_CLIENT
@pytest.mark.parametrize(("status", "hangs"), [(500, False), (200, True)])
def test_a_server_that_fails_or_hangs_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int, hangs: bool
) -> None:
    with receiving(status=status, hangs=hangs) as receiver:
        attempt = attempt_of(tmp_path, settings_of(receiver.url, 0.6))
        attempt.out = str(tmp_path)
        end(attempt)
    lines = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert len(lines) == 1
    assert lines[0].startswith("lineage: a report was not delivered (")


@HAS_CLIENT
def test_no_server_is_one_warning_and_no_address_sends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    attempt = attempt_of(tmp_path, settings_of("http://127.0.0.1:9", 0.5))
    attempt.out = str(tmp_path)
    end(attempt)
    assert caplog.text.count("lineage: a report was not delivered") == 1
    caplog.clear()
    attempt = attempt_of(tmp_path, ReportSettings())
    attempt.out = str(tmp_path)
    end(attempt)
    assert "lineage" not in caplog.text


@HAS_CLIENT
def test_the_variable_of_the_client_names_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OPENLINEAGE_URL", receiver.url)
        monkeypatch.setenv("OPENLINEAGE_API_KEY", "a-key")
        attempt = attempt_of(tmp_path, ReportSettings())
        attempt.out = str(tmp_path)
        end(attempt)
    assert [event["eventType"] for event in receiver.received] == ["START", "COMPLETE"]
    assert {headers["Authorization"] for headers in receiver.headers} == {"Bearer a-key"}


@HAS_CLIENT
def test_events_that_the_transport_only_queues_arrive_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with receiving() as receiver:
        monkeypatch.setenv("OPENLINEAGE__TRANSPORT", f'{{"type": "async_http", "url": "{receiver.url}"}}')
        attempt = attempt_of(tmp_path, ReportSettings())
        attempt.out = str(tmp_path)
        end(attempt)
        assert [event["eventType"] for event in receiver.received] == ["START", "COMPLETE"]


def test_a_missing_client_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    attempt = attempt_of(tmp_path, settings_of("http://127.0.0.1:9"))
    attempt.out = str(tmp_path)
    end(attempt)
    assert caplog.text.count("install rebeca-ray[lineage]") == 1


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("/data/items", ("file", "/data/items")),
        ("s3://bucket/a/b/", ("s3://bucket", "a/b")),
        ("gs://bucket", ("gs://bucket", "/")),
        ("abfss://box@account.dfs.core.windows.net/a", ("abfss://box@account.dfs.core.windows.net", "a")),
    ],
)
def test_datasets_are_named_as_the_specification_says(location: str, name: tuple[str, str]) -> None:
    assert dataset_name(location) == name


def test_a_training_reads_ratings_and_items_and_makes_a_prior(config: GenerateConfig, tmp_path: Path) -> None:
    from rebeca_ray.config.jobs import TrainConfig
    from rebeca_ray.config.sections import InteractionSettings

    ratings = InteractionSettings(path=str(tmp_path / "ratings.parquet"))
    train = TrainConfig(interactions=ratings, items=config.items or "", out=str(tmp_path / "prior"))
    attempt = training_attempt(train, date(2026, 3, 2))
    assert attempt.inputs == {"interactions": ratings.path, "items": config.items, "rated": None}
    assert (attempt.out, attempt.run_date) == (train.out, "2026-03-02")
