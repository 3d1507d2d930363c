"""What every model is measured by: how images are drawn, seen and scored, and what the dense model drew under it."""
