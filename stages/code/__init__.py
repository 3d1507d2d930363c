"""The code that each stage runs -> one hash for each stage."""
