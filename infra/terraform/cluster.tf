# The machines of aws-cluster.yaml: a network that admits nobody, and the roles of head and workers.
resource "aws_security_group" "cluster" {
  name        = "${var.name}-ray"
  description = "Ray nodes reach one another. Nobody else reaches them."
  vpc_id      = var.vpc_id
}

resource "aws_vpc_security_group_ingress_rule" "nodes" {
  security_group_id            = aws_security_group.cluster.id
  referenced_security_group_id = aws_security_group.cluster.id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "nodes" {
  security_group_id            = aws_security_group.cluster.id
  referenced_security_group_id = aws_security_group.cluster.id
  ip_protocol                  = "-1"
}

resource "aws_vpc_security_group_egress_rule" "https" {
  description       = "S3, KMS, EC2, Systems Manager, packages"
  security_group_id = aws_security_group.cluster.id
  cidr_ipv4         = "0.0.0.0/0"
  ip_protocol       = "tcp"
  from_port         = 443
  to_port           = 443
}

data "aws_caller_identity" "current" {}

data "aws_partition" "current" {}

locals {
  ec2 = "arn:${data.aws_partition.current.partition}:ec2:${var.region}"
  our = "${local.ec2}:${data.aws_caller_identity.current.account_id}"
}

# Ray's autoscaler on the head starts and ends workers. By default Ray would give it all rights on EC2 and S3.
data "aws_iam_policy_document" "autoscaler" {
  statement {
    sid       = "Look"
    actions   = ["ec2:DescribeInstances", "ec2:DescribeInstanceStatus"]
    resources = ["*"] # EC2 offers no narrower resource for these
  }
  statement {
    sid       = "StartWorkers"
    actions   = ["ec2:RunInstances"]
    resources = ["${local.our}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "aws:RequestTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid     = "StartWorkersWithTheseParts"
    actions = ["ec2:RunInstances"]
    resources = [
      "${local.ec2}::image/*",
      "${local.our}:key-pair/*",
      "${local.our}:network-interface/*",
      "${local.our}:security-group/${aws_security_group.cluster.id}",
      "${local.our}:subnet/*",
      "${local.our}:volume/*",
    ]
  }
  statement {
    sid       = "TagWorkersAtTheirStart"
    actions   = ["ec2:CreateTags"]
    resources = ["${local.our}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:CreateAction"
      values   = ["RunInstances"]
    }
  }
  statement {
    sid       = "TagAndEndWorkers"
    actions   = ["ec2:CreateTags", "ec2:TerminateInstances"]
    resources = ["${local.our}:instance/*"]
    condition {
      test     = "StringEquals"
      variable = "ec2:ResourceTag/ray-cluster-name"
      values   = [var.name]
    }
  }
  statement {
    sid       = "GiveWorkersTheirRole"
    actions   = ["iam:PassRole"]
    resources = [aws_iam_role.worker.arn]
  }
}

resource "aws_iam_policy" "autoscaler" {
  name   = "${var.name}-autoscaler"
  policy = data.aws_iam_policy_document.autoscaler.json
}

resource "aws_iam_role" "head" {
  name               = "${var.name}-head"
  assume_role_policy = data.aws_iam_policy_document.ec2_assumes.json
}

resource "aws_iam_role" "worker" {
  name               = "${var.name}-worker"
  assume_role_policy = data.aws_iam_policy_document.ec2_assumes.json
}

resource "aws_iam_instance_profile" "head" {
  name = aws_iam_role.head.name
  role = aws_iam_role.head.name
}

resource "aws_iam_instance_profile" "worker" {
  name = aws_iam_role.worker.name
  role = aws_iam_role.worker.name
}

resource "aws_iam_role_policy_attachment" "head_job" {
  role       = aws_iam_role.head.name
  policy_arn = aws_iam_policy.job.arn
}

resource "aws_iam_role_policy_attachment" "head_autoscaler" {
  role       = aws_iam_role.head.name
  policy_arn = aws_iam_policy.autoscaler.arn
}

resource "aws_iam_role_policy_attachment" "worker_job" {
  role       = aws_iam_role.worker.name
  policy_arn = aws_iam_policy.job.arn
}

# `ray up` reaches the head through Systems Manager, so no port is open to it.
resource "aws_iam_role_policy_attachment" "head_sessions" {
  role       = aws_iam_role.head.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/AmazonSSMManagedInstanceCore"
}
