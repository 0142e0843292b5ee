"""Backbones, heads, weights."""
