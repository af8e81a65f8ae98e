"""TFDS dataset builders, imported by name from a config."""
