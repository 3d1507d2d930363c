"""Dense model and real images -> the reference samples and features of one protocol."""
