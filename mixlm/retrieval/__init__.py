"""Searching in passages: what is kept of them, their terms, and the index that brings both together."""
