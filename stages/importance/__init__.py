"""A pretrained model and images -> the importance of each of its weights."""
