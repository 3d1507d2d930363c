"""Packed images, latents and conditions on disk, and grids of images."""
