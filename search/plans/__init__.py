"""Compression plans: a method and rank for each site; spaces and menus of them, costs, the least loss at a budget."""
