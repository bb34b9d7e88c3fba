# The bucket of a catalog, the roles of its writers and readers, and the network of aws-cluster.yaml.
#   cd infra/terraform && terraform init && terraform apply -var bucket=… -var vpc_id=…
terraform {
  required_version = ">= 1.7.0"
  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }
}

provider "aws" {
  region = var.region
}

variable "region" {
  description = "Region of the bucket and the cluster."
  type        = string
  default     = "eu-central-1"
}

variable "bucket" {
  description = "Name of the new bucket, without dots: TLS certificates of S3 cover one label."
  type        = string
  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9-]{1,61}[a-z0-9]$", var.bucket))
    error_message = "bucket: a name of 3 to 63 small letters, digits and hyphens is expected."
  }
}

variable "vpc_id" {
  description = "Network of the cluster. Its private subnets need a way to S3 and to a package index."
  type        = string
}

variable "name" {
  description = "Prefix of all names, and the cluster_name of aws-cluster.yaml."
  type        = string
  default     = "rebeca"
}

variable "catalog_prefix" {
  description = "Folder of the catalog in the bucket. The job reads and writes it, and readers read it."
  type        = string
  default     = "catalog"
}

variable "work_prefixes" {
  description = "Folders of the job's other outputs: embedded items, priors, checkpoints."
  type        = list(string)
  default     = ["embedded", "prior", "runs"]
}

variable "input_prefixes" {
  description = "Folders that the job only reads: interactions, items, requests, models."
  type        = list(string)
  default     = ["inputs"]
}

variable "noncurrent_days" {
  description = "Days that S3 keeps a replaced or removed object. An erased person's images stay as long."
  type        = number
  default     = 7
}
