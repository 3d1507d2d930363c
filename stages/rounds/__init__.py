"""Pretrained model, its importance and images -> the model pruned in several rounds, with recoveries between."""
