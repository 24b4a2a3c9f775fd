"""Rows that a cache holds already, computed again."""
