"""Streams that are answered with a loss: texts, synthetic languages, images for autoencoders."""
