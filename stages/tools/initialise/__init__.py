"""A model and images -> a short params.yaml for them and this machine."""
