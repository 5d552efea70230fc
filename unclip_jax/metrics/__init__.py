"""Figures: what a trained stage or a whole model is worth, as plain numbers from plain arrays."""
