"""A pretrained model and images -> how much each of its weights matters."""
