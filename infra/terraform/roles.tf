# The rights on the bucket: those of the job, and those of readers. Nobody gets a key of his own.
locals {
  catalog_arn    = "${aws_s3_bucket.catalog.arn}/${var.catalog_prefix}"
  written        = concat([var.catalog_prefix], var.work_prefixes)
  read_by_job    = concat(local.written, var.input_prefixes)
  reader_folders = ["latest.json", "snapshots/*", "images/*"]
}

data "aws_iam_policy_document" "job" {
  statement {
    sid     = "ReadInputsAndResults"
    actions = ["s3:GetObject"]
    # The client asks for a folder's name as an object first. A refusal would end the job.
    resources = flatten([
      for prefix in local.read_by_job : [
        "${aws_s3_bucket.catalog.arn}/${prefix}",
        "${aws_s3_bucket.catalog.arn}/${prefix}/*",
      ]
    ])
  }
  statement {
    sid       = "WriteResults"
    actions   = ["s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload"]
    resources = [for prefix in local.written : "${aws_s3_bucket.catalog.arn}/${prefix}/*"]
  }
  statement {
    sid       = "ListFolders"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.catalog.arn]
    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = flatten([for prefix in local.read_by_job : [prefix, "${prefix}/*"]])
    }
  }
  statement {
    sid       = "ListUploadsThatGcEnds" # S3 offers no condition on their prefix
    actions   = ["s3:ListBucketMultipartUploads"]
    resources = [aws_s3_bucket.catalog.arn]
  }
  statement {
    sid       = "UseTheKey"
    actions   = ["kms:Decrypt", "kms:GenerateDataKey"]
    resources = [aws_kms_key.catalog.arn]
  }
}

data "aws_iam_policy_document" "reader" {
  statement {
    sid       = "ReadPublishedSnapshots"
    actions   = ["s3:GetObject"]
    resources = [for path in local.reader_folders : "${local.catalog_arn}/${path}"]
  }
  statement {
    sid       = "ListTheCatalog"
    actions   = ["s3:ListBucket"]
    resources = [aws_s3_bucket.catalog.arn]
    condition {
      test     = "StringLike"
      variable = "s3:prefix"
      values   = [for path in local.reader_folders : "${var.catalog_prefix}/${path}"]
    }
  }
  statement {
    sid       = "UseTheKey"
    actions   = ["kms:Decrypt"]
    resources = [aws_kms_key.catalog.arn]
  }
}

resource "aws_iam_policy" "job" {
  name   = "${var.name}-job"
  policy = data.aws_iam_policy_document.job.json
}

# Attach it to the role of each service that reads the catalog.
resource "aws_iam_policy" "reader" {
  name   = "${var.name}-reader"
  policy = data.aws_iam_policy_document.reader.json
}

data "aws_iam_policy_document" "ec2_assumes" {
  statement {
    actions = ["sts:AssumeRole"]
    principals {
      type        = "Service"
      identifiers = ["ec2.amazonaws.com"]
    }
  }
}

data "aws_iam_policy_document" "pods_assume" {
  statement {
    actions = ["sts:AssumeRole", "sts:TagSession"]
    principals {
      type        = "Service"
      identifiers = ["pods.eks.amazonaws.com"]
    }
  }
}

# The role of pods: an EKS Pod Identity association binds it to the service account `rebeca`.
resource "aws_iam_role" "pod" {
  name               = "${var.name}-pod"
  assume_role_policy = data.aws_iam_policy_document.pods_assume.json
}

resource "aws_iam_role_policy_attachment" "pod" {
  role       = aws_iam_role.pod.name
  policy_arn = aws_iam_policy.job.arn
}
