"""Keys of the block reference for two sets of eight images, measured without a network."""

FEW_IMAGES = {
    "num_images": 8,
    "sets": 2,
    "batch_size": 8,
    "extractor": {"name": "thumbnail"},
    "kid_subsets": 2,
    "kid_subset_size": 4,
    "neighbours": 2,
}
