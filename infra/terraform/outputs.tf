output "catalog" {
  description = "The `catalog` of the configs."
  value       = "s3://${aws_s3_bucket.catalog.bucket}/${var.catalog_prefix}"
}

output "key_arn" {
  description = "The key of the objects. Another account that reads them needs it."
  value       = aws_kms_key.catalog.arn
}

output "job_policy_arn" {
  description = "Rights of the job: for roles of your own, such as those of Slurm's nodes."
  value       = aws_iam_policy.job.arn
}

output "reader_policy_arn" {
  description = "Rights of a service that reads the catalog."
  value       = aws_iam_policy.reader.arn
}

output "pod_role_arn" {
  description = "Role of the service account `rebeca` on EKS."
  value       = aws_iam_role.pod.arn
}

output "instance_profiles" {
  description = "IamInstanceProfile of head and workers in aws-cluster.yaml."
  value = {
    head   = aws_iam_instance_profile.head.name
    worker = aws_iam_instance_profile.worker.name
  }
}

output "security_group_id" {
  description = "SecurityGroupIds in aws-cluster.yaml."
  value       = aws_security_group.cluster.id
}
