"""What is done: one subpackage a stage, and what the stages share."""
