# Plan infra/terraform without an account: these values stand for those that AWS would return.
provider "aws" {
  region                      = "eu-central-1"
  access_key                  = "none"
  secret_key                  = "none"
  skip_credentials_validation = true
  skip_requesting_account_id  = true
  skip_metadata_api_check     = true
  skip_region_validation      = true
}
variables {
  bucket = "example-bucket"
  vpc_id = "vpc-0"
}
override_data {
  target = data.aws_caller_identity.current
  values = { account_id = "111122223333" }
}
override_resource {
  target          = aws_s3_bucket.catalog
  override_during = plan
  values          = { arn = "arn:aws:s3:::example-bucket", id = "example-bucket" }
}
override_resource {
  target          = aws_kms_key.catalog
  override_during = plan
  values          = { arn = "arn:aws:kms:eu-central-1:111122223333:key/0", key_id = "0" }
}
override_resource {
  target          = aws_iam_role.worker
  override_during = plan
  values          = { arn = "arn:aws:iam::111122223333:role/rebeca-worker" }
}
override_resource {
  target          = aws_security_group.cluster
  override_during = plan
  values          = { id = "sg-0" }
}
run "plan" {
  command = plan
}
