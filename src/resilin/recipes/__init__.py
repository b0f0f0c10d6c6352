"""Recipes: published claims as commands. A folder of settings in, measured figures and computed claims out."""
