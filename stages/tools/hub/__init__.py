"""Released models to and from the Hugging Face Hub."""
