"""Recipes: wiring and a citation. One file per paper or baseline; the folder is the registry."""
