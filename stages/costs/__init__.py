"""The models -> time, throughput and memory of a forward pass."""
