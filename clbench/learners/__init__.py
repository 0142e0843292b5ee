"""One file per method; each reads against its paper."""
