"""Dense model and real images -> what every other model is compared with, under one protocol."""
