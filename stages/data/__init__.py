"""Packed images, latents and conditions."""
