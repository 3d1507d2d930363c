"""Files written whole or not at all, tensors, S3, and the record of what made a folder."""
