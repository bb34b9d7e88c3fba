"""Run `rebeca nightly` every night from Dagster with `dagster-ray`, on a cluster that runs already.

The asset has a partition per date. Dagster's process needs `RAY_AUTH_MODE=token` and the token, as any
submitter. Give the pool `rebeca` a limit of 1: two nights would wait for one lease.
"""

import re
import secrets

import dagster as dg
from dagster_ray import PipesRayJobClient

HEAD = "http://rebeca-head-svc:8265"
PERMANENT = {2, 3, 4}  # bad input, error budget, quality gate: a person must look
# The partition of today exists from midnight in UTC on, so a night is started on its date.
DATES = dg.DailyPartitionsDefinition(start_date="2026-01-01", timezone="Etc/UTC", end_offset=1)


@dg.asset(
    partitions_def=DATES,
    pool="rebeca",
    retry_policy=dg.RetryPolicy(max_retries=3, delay=300),
    kinds={"ray", "parquet"},
)
def catalog(context: dg.AssetExecutionContext, ray: PipesRayJobClient) -> dg.MaterializeResult:
    """Publish the snapshot of one date. Missed dates before it are backfilled by the job itself."""
    night = context.partition_key
    attempt = f"rebeca-{night}-{secrets.token_hex(4)}"  # Ray refuses a name that it has seen
    command = f"python /opt/rebeca/jobs/nightly.py --config /etc/rebeca/nightly.yaml run_date={night}"
    try:
        ray.run(context=context, submit_job_params={"entrypoint": command, "submission_id": attempt})
    except RuntimeError as error:
        ended = re.search(r"failed with exit code (\d+)", str(error))
        if ended and int(ended[1]) in PERMANENT:
            raise dg.Failure(
                f"the job ended with {ended[1]}; a retry would too", allow_retries=False
            ) from error
        raise
    return dg.MaterializeResult(metadata={"run_date": night})


nightly = dg.define_asset_job("rebeca_nightly", [catalog], partitions_def=DATES)

defs = dg.Definitions(
    assets=[catalog],
    jobs=[nightly],
    schedules=[dg.build_schedule_from_partitioned_job(nightly, hour_of_day=1)],
    resources={"ray": PipesRayJobClient(address=HEAD)},
)
