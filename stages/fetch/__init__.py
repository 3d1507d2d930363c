"""A source -> a pretrained model as a diffusers folder, and its data as packed images."""
