"""A model and its importance -> a smaller model that runs, and the plan with the channels that were kept."""
