"""The fields of KubeRay's custom resources that `infra/kubernetes` uses. These models refuse any other.

Written by hand from the types and the validation of KubeRay 1.7.1 (`ray-operator/apis/ray/v1` and
`controllers/ray/utils/validation.go`). A pod template is checked by the schema of Kubernetes.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[int, Field(ge=1)]
DELETION_ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=36)]  # of a RayCronJob
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class PodTemplate(Strict):
    metadata: dict[str, Any] = {}
    spec: dict[str, Any]


class AuthOptions(Strict):
    mode: Literal["disabled", "token"] = "token"
    secretName: str | None = None


class NetworkPolicy(Strict):
    mode: Literal["DenyAll", "DenyAllIngress", "DenyAllEgress"] = "DenyAll"


class TLSOptions(Strict):
    enabled: bool = False


class GcsStorage(Strict):
    size: str = "1Gi"
    storageClassName: str | None = None


class GcsFaultTolerance(Strict):
    backend: Literal["redis", "rocksdb"] = "redis"
    storage: GcsStorage | None = None


class Collector(Strict):
    image: str


class HistoryServer(Strict):
    collectorOptions: Collector


class HeadGroupSpec(Strict):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroupSpec(Strict):
    groupName: str
    replicas: Count = 0
    minReplicas: Count = 0
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: PodTemplate


class RayClusterSpec(Strict):
    rayVersion: str
    authOptions: AuthOptions | None = None
    networkPolicy: NetworkPolicy | None = None
    tlsOptions: TLSOptions | None = None
    gcsFaultToleranceOptions: GcsFaultTolerance | None = None
    historyServerOptions: HistoryServer | None = None
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: list[WorkerGroupSpec]


class SubmitterConfig(Strict):
    backoffLimit: Count


class DeletionCondition(Strict):
    jobStatus: Literal["SUCCEEDED", "FAILED"] | None = None
    jobDeploymentStatus: Literal["Failed"] | None = None
    ttlSeconds: Count = 0

    @model_validator(mode="after")
    def has_one_status(self) -> Self:
        if (self.jobStatus is None) == (self.jobDeploymentStatus is None):
            raise ValueError("a deletion condition has one of jobStatus and jobDeploymentStatus")
        return self


class DeletionRule(Strict):
    policy: Literal["DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"]
    condition: DeletionCondition


class DeletionStrategy(Strict):
    deletionRules: Annotated[list[DeletionRule], Field(min_length=1)]

    @model_validator(mode="after")
    def is_ordered(self) -> Self:
        """Refuse two rules of a status for one policy, and a cluster that goes before its workers."""
        by_status: dict[str, dict[str, int]] = {}
        for rule in self.deletionRules:
            condition = rule.condition
            seconds = by_status.setdefault(condition.jobStatus or f"{condition.jobDeploymentStatus}", {})
            if rule.policy in seconds:
                raise ValueError(f"two rules for {rule.policy}")
            seconds[rule.policy] = condition.ttlSeconds
        for seconds in by_status.values():
            ordered = [seconds[policy] for policy in DELETION_ORDER if policy in seconds]
            if ordered != sorted(ordered):
                raise ValueError(f"{seconds}: workers go first, then the cluster, then the job")
        return self


class RayJobSpec(Strict):
    entrypoint: str
    backoffLimit: Count = 0
    activeDeadlineSeconds: Seconds | None = None
    preRunningDeadlineSeconds: Seconds | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    deletionStrategy: DeletionStrategy | None = None
    suspend: bool = False
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    submitterConfig: SubmitterConfig | None = None
    submitterPodTemplate: PodTemplate | None = None
    rayClusterSpec: RayClusterSpec

    @model_validator(mode="after")
    def ends_in_one_way(self) -> Self:
        if self.deletionStrategy and self.shutdownAfterJobFinishes:
            raise ValueError("shutdownAfterJobFinishes and deletionRules exclude each other")
        if self.ttlSecondsAfterFinished and not self.shutdownAfterJobFinishes:
            raise ValueError("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
        if self.suspend and not self.shutdownAfterJobFinishes:
            raise ValueError("suspend needs shutdownAfterJobFinishes")
        return self


class RayCronJobSpec(Strict):
    """A RayCronJob has no concurrencyPolicy, and its `jobTemplate` is a RayJob's spec."""

    schedule: str
    timeZone: Annotated[str, Field(min_length=1)] | None = None
    suspend: bool = False
    jobTemplate: RayJobSpec


class Resource(Strict):
    apiVersion: Literal["ray.io/v1"]
    metadata: Metadata


class RayCluster(Resource):
    kind: Literal["RayCluster"]
    spec: RayClusterSpec


class RayJob(Resource):
    kind: Literal["RayJob"]
    spec: RayJobSpec


class RayCronJob(Resource):
    kind: Literal["RayCronJob"]
    spec: RayCronJobSpec


KINDS: dict[str, type[Resource]] = {"RayCluster": RayCluster, "RayJob": RayJob, "RayCronJob": RayCronJob}
