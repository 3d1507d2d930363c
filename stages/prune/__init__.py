"""A model and its importance -> a smaller model that still runs, and the record of what was kept."""
