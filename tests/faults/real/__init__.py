"""Faults of real processes.

An S3 server, a Ray cluster and Triton stay between the nights that they disturb.
"""
