"""The Terraform files: planned by Terraform where it is installed, and the recorded plan elsewhere.

The S3 requests of a real night are held against the planned policies: they are enough, and not too much.
"""

import datetime
import json
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import s3fs

from rebeca_ray.catalog.gc import collect
from rebeca_ray.catalog.read import read_catalog
from rebeca_ray.config.jobs import GenerateConfig
from rebeca_ray.storage.leftovers import remove_leftovers
from tests.conftest import REPO, snapshot_of
from tests.faulty_s3 import FaultyS3, Request
from tests.platforms import terraform

BUCKET = "example-bucket"  # of plan.tftest.hcl
PLAN = terraform.recorded()
Statement = dict[str, Any]


def statements(name: str) -> list[Statement]:
    return list(PLAN[f"data.aws_iam_policy_document.{name}"]["statement"])


@pytest.mark.skipif(bool(terraform.missing()), reason=f"no plan by Terraform: needs {terraform.missing()}")
def test_terraform_validates_the_files_and_plans_the_record(tmp_path: Path) -> None:
    """By Terraform and the AWS provider. All other tests of this file use the recorded plan."""
    assert terraform.plan(tmp_path) == PLAN


def test_the_configs_of_kubernetes_lie_in_the_folders_that_the_policies_open() -> None:
    variables = (REPO / "infra/terraform/variables.tf").read_text()
    pattern = r'(?ms)^variable "(\w+_prefix(?:es)?)" {.*?^  default     = (.+?)$'
    defaults = re.findall(pattern, variables)
    folders = {kind: set(json.loads(f"[{value.strip('[]')}]")) for kind, value in defaults}
    assert folders.keys() == {"catalog_prefix", "work_prefixes", "input_prefixes"}
    configs = [
        path
        for name in ("base", "overlays/prod", "overlays/kueue")
        for path in (REPO / "infra/kubernetes" / name / "config").glob("*.yaml")
    ]
    used = {folder for path in configs for folder in re.findall(r"s3://rebeca/(\w+)", path.read_text())}
    assert used == set.union(*folders.values())


def test_the_bucket_is_closed_encrypted_and_versioned() -> None:
    closed = PLAN["aws_s3_bucket_public_access_block.catalog"]
    switches = ("block_public_acls", "block_public_policy", "ignore_public_acls", "restrict_public_buckets")
    assert [closed[name] for name in switches] == [True] * 4
    (rule,) = PLAN["aws_s3_bucket_server_side_encryption_configuration.catalog"]["rule"]
    (encryption,) = rule["apply_server_side_encryption_by_default"]
    assert encryption["sse_algorithm"] == "aws:kms"
    assert ":key/" in encryption["kms_master_key_id"]
    assert PLAN["aws_kms_key.catalog"]["enable_key_rotation"] is True
    (versioning,) = PLAN["aws_s3_bucket_versioning.catalog"]["versioning_configuration"]
    assert versioning == {"status": "Enabled"}
    (ownership,) = PLAN["aws_s3_bucket_ownership_controls.catalog"]["rule"]
    assert ownership == {"object_ownership": "BucketOwnerEnforced"}
    (tls,) = statements("tls")
    assert (tls["effect"], tls["actions"]) == ("Deny", ["s3:*"])
    assert tls["condition"] == [{"test": "Bool", "variable": "aws:SecureTransport", "values": ["false"]}]
    assert tls["resources"] == [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"]


def test_no_lifecycle_rule_removes_a_current_object() -> None:
    replaced, uploads = PLAN["aws_s3_bucket_lifecycle_configuration.catalog"]["rule"]
    assert replaced["noncurrent_version_expiration"] == [{"noncurrent_days": 7}]
    assert uploads["abort_incomplete_multipart_upload"] == [{"days_after_initiation": 7}]
    for rule in (replaced, uploads):
        assert rule["status"] == "Enabled"
        assert rule["transition"] == rule["noncurrent_version_transition"] == []
        for expiration in rule["expiration"]:  # markers of removed objects alone
            assert expiration == {"days": 0, "expired_object_delete_marker": True}


def test_no_policy_allows_everything_or_everybody() -> None:
    documents = [name for name in PLAN if name.startswith("data.aws_iam_policy_document.")]
    assert {name.rpartition(".")[2] for name in documents} >= {"job", "reader", "autoscaler", "tls"}
    for name in documents:
        for statement in PLAN[name]["statement"]:
            assert "not_actions" not in statement, name
            assert "not_resources" not in statement, name
            if statement.get("effect") == "Deny":
                continue
            assert not [action for action in statement["actions"] if "*" in action], name
            assert statement["principals"] == [], name
            looks_only = all(":Describe" in action for action in statement["actions"])
            assert looks_only or "*" not in statement["resources"], name
    services = {"pod": "pods.eks.amazonaws.com", "head": "ec2.amazonaws.com"}
    for role, service in services.items():
        (trust,) = json.loads(PLAN[f"aws_iam_role.{role}"]["assume_role_policy"])["Statement"]
        assert trust["Principal"] == {"Service": service}


def test_the_cluster_admits_its_nodes_alone() -> None:
    assert PLAN["aws_security_group.cluster"]["ingress"] == []
    admitted = [PLAN[name] for name in PLAN if name.startswith("aws_vpc_security_group_ingress_rule.")]
    assert len(admitted) == 1
    for rule in admitted:
        assert rule["referenced_security_group_id"] == rule["security_group_id"]
        assert "cidr_ipv4" not in rule
        assert "cidr_ipv6" not in rule


def right_of(request: Request) -> tuple[str, str, str | None]:
    """Return the action, the resource and the listed prefix that AWS checks for a request."""
    url = urlsplit(request.path)
    query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
    bucket, _, key = unquote(url.path).lstrip("/").partition("/")
    resource = f"arn:aws:s3:::{bucket}"
    match request.method, bool(key):
        case "GET", False if "uploads" in query:
            return "s3:ListBucketMultipartUploads", resource, None
        case "GET" | "HEAD", False:
            return "s3:ListBucket", resource, query.get("prefix", "")
        case "POST", False if "delete" in query:
            return "s3:DeleteObject", f"{resource}/catalog/", None  # the keys are in its body
        case "GET" | "HEAD", True:
            return "s3:GetObject", f"{resource}/{key}", None
        case "DELETE", True if "uploadId" in query:
            return "s3:AbortMultipartUpload", f"{resource}/{key}", None
        case "DELETE", True:
            return "s3:DeleteObject", f"{resource}/{key}", None
        case "PUT" | "POST", True:
            return "s3:PutObject", f"{resource}/{key}", None
    raise AssertionError(f"{request}: no known right")


def allows(policy: list[Statement], action: str, resource: str, prefix: str | None) -> bool:
    """Return whether a policy allows a request."""
    return any(
        action in statement["actions"]
        and any(fnmatchcase(resource, pattern) for pattern in statement["resources"])
        and all(
            any(fnmatchcase(prefix or "", pattern) for pattern in condition["values"])
            for condition in statement["condition"]
        )
        for statement in policy
    )


def actions_of(policy: list[Statement], service: str) -> set[str]:
    actions = {action for statement in policy for action in statement["actions"]}
    return {action for action in actions if action.startswith(f"{service}:")}


def used(proxy: FaultyS3, policy: list[Statement]) -> set[str]:
    """Return the actions of the proxy's requests. The policy must allow each request."""
    rights = {right_of(request) for request in proxy.requests if request.path != f"/{BUCKET}"}
    refused = [right for right in rights if not allows(policy, *right)]
    assert refused == []
    return {action for action, _, _ in rights}


def on_store(config: GenerateConfig, store: s3fs.S3FileSystem) -> GenerateConfig:
    """Upload the inputs to the folders of the policies. Return the config of a night on the store."""
    store.makedirs(BUCKET, exist_ok=True)
    uploads = {"prior": "prior", "request": "inputs/request.parquet", "items": "embedded/items.parquet"}
    for name, key in uploads.items():
        store.put(str(getattr(config, name)), f"{BUCKET}/{key}", recursive=True)
    folders = {name: f"s3://{BUCKET}/{key}" for name, key in uploads.items()}
    return config.model_copy(update={**folders, "catalog": f"s3://{BUCKET}/catalog"})


def test_a_night_and_its_readers_need_their_rights_and_no_more(
    config: GenerateConfig, proxy: FaultyS3, s3_server: dict[str, str]
) -> None:
    """HEAD of the bucket is left out: it only asks whether a server answers, and a refusal is an answer."""
    store = s3fs.S3FileSystem(endpoint_url=s3_server["AWS_ENDPOINT_URL"], skip_instance_cache=True)
    config = on_store(config, store)
    proxy.misbehave([])
    for day in (1, 2, 3):
        snapshot_of(config.model_copy(update={"run_date": datetime.date(2026, 3, day)}))
    store.call_s3("create_multipart_upload", Bucket=BUCKET, Key="catalog/images/left")
    before = set(store.find(f"{BUCKET}/catalog"))
    collect(config.catalog, keep=1, grace_hours=0)
    remove_leftovers(config.catalog, datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1))
    assert before - set(store.find(f"{BUCKET}/catalog", refresh=True))  # gc removed below the catalog alone
    assert len(store.find(f"{BUCKET}/inputs", refresh=True)) == 1
    job, reader = statements("job"), statements("reader")
    assert used(proxy, job) == actions_of(job, "s3")

    proxy.misbehave([])
    snapshot = read_catalog(config.catalog)
    items = snapshot.items()
    assert len(snapshot.images(items)) == items.num_rows
    assert used(proxy, reader) <= actions_of(reader, "s3") == {"s3:GetObject", "s3:ListBucket"}
    assert "s3:GetObject" in used(proxy, reader)
    assert not allows(reader, "s3:GetObject", f"arn:aws:s3:::{BUCKET}/inputs/request.parquet", None)
    assert not allows(job, "s3:PutObject", f"arn:aws:s3:::{BUCKET}/inputs/request.parquet", None)
    # Of the key, a reader decrypts and a writer encrypts too.
    assert actions_of(reader, "kms") == {"kms:Decrypt"}
    assert actions_of(job, "kms") == {"kms:Decrypt", "kms:GenerateDataKey"}
