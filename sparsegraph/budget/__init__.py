"""Budgets: which density every layer gets, from its shape, its weights, or measured tables."""
