"""Dense and pruned models -> their quality over numbers of steps, samplers and guidance scales."""
