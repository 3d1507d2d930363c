"""Names of the files and components of a model folder."""

PLAN = "pruning_plan.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
CLASS_EMBEDDING = "class_embedding"
"""Component of a class-conditional pipeline: config.json {num_classes, width, unconditional} and the table `weight`."""
AUTOENCODERS = ("vqvae", "vae")
"""Component names that diffusers pipelines use for an autoencoder."""
