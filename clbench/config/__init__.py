"""From the command line's overrides to checked plain dictionaries, and from those to objects."""
