"""Labelled images: data sets, pixels, batches."""
