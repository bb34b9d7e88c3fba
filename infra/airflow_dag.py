"""Run `rebeca nightly` every night from Airflow 3.3 or newer, on the standing cluster of infra/kubernetes.

A pod of the submitter's image, in the cluster's namespace, submits the job, follows its log, and ends with
its exit code. Airflow retries codes that a retry mends, and no others. The provider
`apache-airflow-providers-cncf-kubernetes` is needed.
"""

import datetime
import re

from airflow.providers.cncf.kubernetes.operators.pod import KubernetesPodOperator
from airflow.sdk import DAG, CronTriggerTimetable, RetryDecision, RetryPolicy
from kubernetes.client import models as k8s

HEAD = "http://rebeca-head-svc:8265"
PERMANENT = {2, 3, 4}  # bad input, error budget, quality gate: a person must look

# `ray job submit` ends with 1 for every failure and with 0 for a stopped job. The script therefore reads the
# exit code of the job. A pod that starts a second time follows the job that it submitted before.
SUBMIT = """
id="rebeca-$NIGHT-$ATTEMPT"
ray job submit --no-wait --submission-id "$id" -- \
  python /opt/rebeca/jobs/nightly.py --config /etc/rebeca/nightly.yaml "run_date=$NIGHT"
while true; do
  ray job logs --follow "$id"
  state=$(ray job status "$id" 2>&1)
  [[ $state == *"Status for job '$id':"* ]] || break
  sleep 10
done
code=1
[[ $state =~ "Job entrypoint command failed with exit code "([0-9]+) ]] && code=${BASH_REMATCH[1]}
[[ $state == *"Job '$id' succeeded"* && $code == 1 ]] && code=0
echo "exit code $code" > /dev/termination-log
exit "$code"
"""


class RetryUnlessPermanent(RetryPolicy):
    """Retry a night, unless its exit code says that the same command would end in the same way."""

    def evaluate(
        self, exception: BaseException, try_number: int, max_tries: int, context: object = None
    ) -> RetryDecision:
        ended = re.search(r"exit code (\d+)", str(exception))
        if ended and int(ended[1]) in PERMANENT:
            return RetryDecision.fail(f"the job ended with {ended[1]}; a retry would too")
        return RetryDecision.default()


with DAG(
    dag_id="rebeca_nightly",
    schedule=CronTriggerTimetable("0 1 * * *", timezone="UTC"),  # rebeca's dates are UTC
    start_date=datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
    catchup=False,  # `rebeca nightly` runs missed dates itself, the oldest first
    max_active_runs=1,  # two nights would wait for one lease
    tags=["rebeca"],
) as dag:
    KubernetesPodOperator(
        task_id="nightly",
        namespace="rebeca",  # of the cluster, with its token, its service's name and its network policy
        service_account_name="rebeca-submitter",
        image="rebeca-client:0.1.0",  # of your registry
        cmds=["bash", "-uc"],
        arguments=[SUBMIT],
        env_vars={
            "HOME": "/tmp",
            "NIGHT": "{{ (dag_run.logical_date or dag_run.run_after) | ds }}",
            "ATTEMPT": "{{ ti.try_number }}",
            "RAY_API_SERVER_ADDRESS": HEAD,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": "/var/run/ray-token/auth_token",
        },
        labels={"app": "rebeca-submitter"},  # networkpolicy.yaml admits these pods to the head
        automount_service_account_token=False,
        security_context=k8s.V1PodSecurityContext(
            run_as_non_root=True,
            run_as_user=1000,
            run_as_group=1000,
            fs_group=1000,
            seccomp_profile=k8s.V1SeccompProfile(type="RuntimeDefault"),
        ),
        container_security_context=k8s.V1SecurityContext(
            allow_privilege_escalation=False,
            read_only_root_filesystem=True,
            capabilities=k8s.V1Capabilities(drop=["ALL"]),
        ),
        container_resources=k8s.V1ResourceRequirements(
            requests={"cpu": "200m", "memory": "512Mi"}, limits={"cpu": "1", "memory": "1Gi"}
        ),
        volumes=[
            k8s.V1Volume(
                name="token",
                secret=k8s.V1SecretVolumeSource(secret_name="rebeca-ray-token", default_mode=0o440),
            ),
            k8s.V1Volume(name="tmp", empty_dir=k8s.V1EmptyDirVolumeSource()),
        ],
        volume_mounts=[
            k8s.V1VolumeMount(name="token", mount_path="/var/run/ray-token", read_only=True),
            k8s.V1VolumeMount(name="tmp", mount_path="/tmp"),
        ],
        retries=3,
        retry_delay=datetime.timedelta(minutes=5),
        retry_policy=RetryUnlessPermanent(),
        execution_timeout=datetime.timedelta(hours=22),
        on_finish_action="delete_succeeded_pod",  # the logs of a failed pod stay
        log_pod_spec_on_failure=False,
    )
