"""Numbers for params.yaml with which the pipeline runs in a minute; it imports nothing, for .ci/image."""

SMALL = {
    "importance": {"stride": 250, "num_images": 4, "report": {"timesteps": 2, "draws": 2}},
    "finetune": {
        "steps": 12,
        "batch_size": 16,
        "heldout_images": 16,
        "heldout_every": 6,
        "checkpoint_every": 2,
        "samples": {"every": 6, "num_images": 8, "steps": 2},
    },
    "reference": {"num_images": 8, "sets": 2, "kid_subset_size": 4, "kid_subsets": 2, "sampler": {"steps": 2}},
    "costs": {"batches": [1, 2], "repeats": 6, "seconds": 0.5},
}
