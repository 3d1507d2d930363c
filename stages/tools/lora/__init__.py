"""A LoRA adapter of the dense model -> one of the pruned model."""
