"""Comparisons of whole trainings: the same budget from several starts, and what came of each."""
