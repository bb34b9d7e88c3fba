"""The fields of KubeRay 1.7's custom resources that `infra/` uses. These models refuse any other."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(Strict):
    name: str
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class PodTemplate(Strict):
    """A pod template. The schema of Kubernetes checks both parts."""

    metadata: dict[str, Any] = {}
    spec: dict[str, Any]


class AuthOptions(Strict):
    mode: Literal["disabled", "token"] = "token"
    secretName: str | None = None


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
    headGroupSpec: HeadGroupSpec
    workerGroupSpecs: list[WorkerGroupSpec]


class SubmitterConfig(Strict):
    backoffLimit: Count


class RayJobSpec(Strict):
    entrypoint: str
    backoffLimit: Count = 0
    activeDeadlineSeconds: Seconds | None = None
    preRunningDeadlineSeconds: Seconds | None = None
    shutdownAfterJobFinishes: bool = False
    ttlSecondsAfterFinished: Count = 0
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    submitterConfig: SubmitterConfig | None = None
    submitterPodTemplate: PodTemplate | None = None
    rayClusterSpec: RayClusterSpec


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
