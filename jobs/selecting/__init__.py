"""How recipes.py selects a recipe: its variants, their fine-tuning, tables."""
