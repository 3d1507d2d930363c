"""A program that nobody has reviewed -> its output, from a process that can reach nothing else of the machine."""
