"""Load the files of Airflow and Dagster with the real libraries, and print the facts that a test compares.

Runs in an environment that has Airflow or Dagster, and has neither rebeca_ray nor its tests' packages:
`PYTHON orchestrators.py airflow|dagster FOLDER_OF_INFRA`.
"""

import datetime
import importlib.metadata
import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ENDS = (1, 2, 3, 4, 5, 75)
os.environ.setdefault("AIRFLOW__CORE__DAGBAG_IMPORT_TIMEOUT", "250")  # a busy machine imports slowly


def airflow(infra: Path) -> dict[str, Any]:
    """Import and serialize the DAG as Airflow does, build its pod, and ask its policy about each end."""
    from airflow.dag_processing.dagbag import DagBag
    from airflow.serialization.serialized_objects import DagSerialization
    from airflow.timetables.base import TimeRestriction

    bag = DagBag(dag_folder=str(infra / "airflow_dag.py"))
    assert bag.import_errors == {}, bag.import_errors
    (dag,) = bag.dags.values()
    (task,) = dag.tasks
    stored = DagSerialization.from_dict(DagSerialization.to_dict(dag))
    start = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
    due = stored.timetable.next_dagrun_info(
        last_automated_data_interval=None, restriction=TimeRestriction(start, None, True)
    )
    task.__dict__["hook"] = SimpleNamespace(is_in_cluster=True, get_namespace=lambda: None)  # no cluster
    pod = task.build_pod_request_obj()
    (container,) = pod.spec.containers
    variables = {variable.name: variable.value for variable in container.env}
    decisions = {
        code: task.retry_policy.evaluate(
            RuntimeError(f"Pod p returned a failure.\nexit code {code}\n"), 1, 3
        ).action.value
        for code in ENDS
    }
    return {
        "versions": versions("apache-airflow", "apache-airflow-providers-cncf-kubernetes"),
        "dag": [dag.dag_id, stored.catchup, stored.max_active_runs],
        "first_run": due.logical_date.isoformat(),
        "operator": task.task_type,
        "retries": task.retries,
        "decisions": decisions,
        "lost_pod": task.retry_policy.evaluate(RuntimeError("Pod p returned a failure."), 1, 3).action.value,
        "command": [*container.command, *container.args],
        "variables": variables,
        "image": container.image,
        "pod": json.loads(json.dumps(pod.spec.to_dict(), default=str)),
        "labels": pod.metadata.labels,
    }


def dagster(infra: Path) -> dict[str, Any]:
    """Load the definitions, evaluate a tick of the schedule, and call the asset with a stub for Ray."""
    import dagster as dg
    from dagster_ray import PipesRayJobClient

    specification = importlib.util.spec_from_file_location(
        "dagster_definitions", infra / "dagster_definitions.py"
    )
    assert specification
    assert specification.loader
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    dg.Definitions.validate_loadable(module.defs)
    (schedule,) = module.defs.get_repository_def().schedule_defs
    tick = dg.build_schedule_context(
        scheduled_execution_time=datetime.datetime(2026, 3, 2, 1, tzinfo=datetime.UTC),
        repository_def=module.defs.get_repository_def(),
    )
    (request,) = schedule.evaluate_tick(tick).run_requests
    submitted: list[dict[str, Any]] = []

    class Stub(PipesRayJobClient):
        code = 0

        def run(self, *, context: Any, submit_job_params: Any, extras: Any = None) -> Any:
            submitted.append(dict(submit_job_params))
            if self.code:
                raise RuntimeError(
                    "[pipes] Ray job x failed with status FAILED. Message:\n"
                    f"Job entrypoint command failed with exit code {self.code}, last"
                )

    outcomes = {}
    for code in (0, *ENDS):
        stub = Stub()
        stub.code = code
        context = dg.build_asset_context(partition_key=request.partition_key)
        try:
            module.catalog(context=context, ray=stub)
            outcomes[code] = "success"
        except dg.Failure as failure:
            outcomes[code] = "retry" if failure.allow_retries else "fail"
        except RuntimeError:
            outcomes[code] = "retry"
    return {
        "versions": versions("dagster", "dagster-ray", "ray"),
        "schedule": [schedule.cron_schedule, schedule.execution_timezone],
        "partition": request.partition_key,
        "submitted": submitted[0],
        "outcomes": outcomes,
        "address": module.defs.resources["ray"]._address,
    }


def versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    print("\n" + json.dumps({"airflow": airflow, "dagster": dagster}[sys.argv[1]](Path(sys.argv[2]))))
