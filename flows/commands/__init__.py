"""Commands of the command line; a module here imports nothing heavy before a command runs."""
