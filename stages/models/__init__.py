"""Diffusion models: families, load and save, groups and their scores, plan, cost, sampling, autoencoder."""
