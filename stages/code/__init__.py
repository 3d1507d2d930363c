"""The code of each stage as it runs -> one hash a stage."""
