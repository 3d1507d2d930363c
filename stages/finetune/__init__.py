"""A pruned model and images -> the same model, recovered by a short training."""
