"""Atomic writes of files and folders, tensors, S3, and run records."""
