"""What several stages must know of diffusion: models, noise, sampling, cost."""
