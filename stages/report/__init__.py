"""Outputs of the other stages -> results table, figures, page, and a card for each model."""
