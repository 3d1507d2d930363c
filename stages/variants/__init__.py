"""Models and a reference -> variants of them, and the quality of each."""
