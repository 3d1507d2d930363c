"""The measurement protocol, its feature extractors, and the records that are compared under it."""
