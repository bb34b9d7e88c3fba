"""A real Prometheus scrapes a real night: every expression of the dashboard and of the alerts has data."""

import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from rebeca_ray.catalog.manifest import Manifest
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.decoder import DecoderSettings
from rebeca_ray.config.sections import LayoutSettings, LimitSettings
from rebeca_ray.telemetry.metrics import METRICS
from tests.conftest import NO_GATE, REPO, generate_config
from tests.telemetry.servers import Prometheus, prometheus, tiny_triton

MONITORING = REPO / "infra" / "monitoring"
ALERTS = (MONITORING / "alerts.yaml").read_text()
NAME = re.compile(r"\b(?:ray_rebeca|nv)_\w+")
RULES = [rule for group in yaml.safe_load(ALERTS)["groups"] for rule in group["rules"]]
VARIABLES = {"$__rate_interval": "5s", "$price": "2.5"}

needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="promtool is missing: Debian's package `prometheus` has it"
)


@needs_promtool
def test_the_alerts_are_valid_and_fire_on_recorded_nights() -> None:
    for command in ("check", "test"):
        file = MONITORING / "alerts.yaml" if command == "check" else REPO / "tests/telemetry/alerts_test.yaml"
        result = subprocess.run(["promtool", command, "rules", file], capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr


def test_each_alert_leads_to_a_heading_of_the_runbook() -> None:
    headings = re.findall(r"^## (.+)$", (REPO / "infra/docs/operations.md").read_text(), re.MULTILINE)
    slugs = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    for rule in RULES:
        page, _, slug = rule["annotations"]["runbook_url"].partition("#")
        assert (page, slug in slugs) == ("infra/docs/operations.md", True), rule["alert"]


class Scraped:
    """A night that a Prometheus scrapes, its manifest, and the process that ran it."""

    def __init__(self, server: Prometheus, process: subprocess.Popen[str], manifest: Manifest) -> None:
        self.server, self.process, self.manifest = server, process, manifest

    def values(self, name: str) -> dict[tuple[str, ...], float]:
        """Return the sums of a metric's series now, by its words."""
        metric = next(metric for metric in METRICS if metric.name == name)
        series = self.server.now(f"sum by ({','.join(metric.keys)}) (ray_{name})")
        return {tuple(one["metric"][key] for key in metric.keys): float(one["value"][1]) for one in series}


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory, tiny_decoder: DecoderSettings) -> Iterator[Scraped]:
    """Run a night of 36 items until it is published, and scrape it every second. The gate objects in vain."""
    if not shutil.which("prometheus"):
        pytest.skip("prometheus is missing: install Debian's package `prometheus`")
    if not shutil.which("tritonserver") and importlib.util.find_spec("pytriton") is None:
        pytest.skip("Triton Inference Server is missing: install the wheel `nvidia-pytriton`")
    folder = tmp_path_factory.mktemp("scraped")
    ray_folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short, for the sockets' paths
    ends = datetime.now(UTC) + timedelta(hours=3)
    config = generate_config(folder, tiny_decoder.model_copy(update={"batch_size": 2})).model_copy(
        update={
            "error_budget": 0.5,
            "num_images": 8,
            "gate": NO_GATE.model_copy(update={"max_filtered": 0.001, "min_sample": 1}),
            "layout": LayoutSettings(images_per_file=4),
            "limits": LimitSettings(publish_by=f"{ends:%H:%M}"),
        }
    )
    environment = {**os.environ, "RAY_TMPDIR": str(ray_folder), "RAY_metrics_report_interval_ms": "1000"}
    environment.pop("RAY_ADDRESS", None)
    hasty = re.sub(r"> 900\) and", "> 3) and", ALERTS).replace("for: 1m", "for: 0s")
    assert hasty != ALERTS
    with (
        tiny_triton(folder) as triton_port,
        prometheus(folder, ray_folder / "ray", triton_port, hasty) as server,
        subprocess.Popen(
            [sys.executable, "-m", "tests.telemetry.night", config.model_dump_json()],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        ) as process,
    ):
        assert line_of(process) == "published"
        server.wait_for('ray_rebeca_ended_total{command="generate"}')
        yield Scraped(server, process, read_catalog(config.catalog).manifest)
        process.stdin.close()  # type: ignore[union-attr]
    shutil.rmtree(ray_folder, ignore_errors=True)


def test_the_scraped_values_are_those_of_the_manifest(scraped: Scraped) -> None:
    counts = scraped.manifest.counts
    assert (counts.requested, counts.new, counts.failed, counts.filtered) == (36, 34, 1, 1)
    assert scraped.values("rebeca_items") == {
        (outcome,): getattr(counts, outcome)
        for outcome in ("new", "carried", "population", "failed", "filtered", "deferred")
    }
    assert scraped.values("rebeca_rows_total") == {("plan",): 36, ("render",): 36}
    assert scraped.values("rebeca_failed_rows_total") == {("render",): 1}
    assert scraped.values("rebeca_unsafe_images_total") == {
        ("flagged",): 1, ("left_out",): 1, ("regenerated",): 1,
    }  # fmt: skip
    (calls,) = scraped.server.now('sum(ray_rebeca_call_seconds_count{stage="render"})')
    assert float(calls["value"][1]) == 18  # of two images each
    created = datetime.fromisoformat(scraped.manifest.created_at).timestamp()
    assert scraped.values("rebeca_published_timestamp_seconds") == {(): created}
    assert scraped.values("rebeca_ended_total") == {("generate", "success"): 1}
    assert scraped.values("rebeca_gate_refusals_total") == {("snapshot",): 1}
    assert scraped.values("rebeca_active") == {("generate",): 0}


def test_every_expression_of_the_dashboard_has_data(scraped: Scraped) -> None:
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    empty = [expression for expression in expressions if not has_numbers(scraped.server, expression)]
    assert (len(expressions) > 25, empty) == (True, [])


def test_every_metric_has_data_and_every_name_of_dashboard_and_alerts_is_one(scraped: Scraped) -> None:
    exported = {
        f"ray_{metric.name}{suffix}"
        for metric in METRICS
        for suffix in (("_bucket", "_count", "_sum") if metric.kind == "histogram" else ("",))
    }
    used = set(NAME.findall((MONITORING / "dashboard.json").read_text()))
    used |= {name for rule in RULES for name in NAME.findall(rule["expr"])}
    ours = {name for name in used if name.startswith("ray_")}
    assert ours <= exported
    assert [name for name in sorted(exported | used) if not has_numbers(scraped.server, name)] == []


def has_numbers(server: Prometheus, expression: str) -> bool:
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    values = [float(value) for series in server.history(expression) for _, value in series["values"]]
    return any(math.isfinite(value) for value in values)


def firing(server: Prometheus) -> list[Any]:
    return sorted(series["metric"]["alertname"] for series in server.now('ALERTS{alertstate="firing"}'))


def test_a_healthy_night_fires_no_alert_and_a_stalled_process_fires_one(scraped: Scraped) -> None:
    assert firing(scraped.server) == []
    scraped.process.stdin.write("\n")  # type: ignore[union-attr]
    scraped.process.stdin.flush()  # type: ignore[union-attr]
    assert line_of(scraped.process) == "stalled"
    (alert,) = scraped.server.wait_for('ALERTS{alertstate="firing"}')
    assert (alert["metric"]["alertname"], alert["metric"]["command"]) == ("RebecaRunStalled", "generate")
