"""A model and seeds -> images by the thousand, in shards that several workers draw."""
