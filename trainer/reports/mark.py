"""The line by which a page of ours is known."""

MARK = "<!-- written by repa compare -->"
"""Stands at the beginning of a page, so that nothing but a page is written over."""
