"""Dense, pruned and finetuned models -> how well they draw, how alike, and what they cost."""
