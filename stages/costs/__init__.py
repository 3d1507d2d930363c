"""Models -> time, throughput and memory of a forward pass."""
