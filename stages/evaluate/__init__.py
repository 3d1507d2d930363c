"""Reference and models -> image quality of each model and its similarity to the dense model."""
