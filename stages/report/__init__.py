"""What the other stages found -> one page to look at, figures, and a model card beside every model."""
