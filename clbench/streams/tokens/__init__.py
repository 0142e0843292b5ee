"""Streams evaluated by a loss: texts, synthetic languages, images for autoencoders."""
