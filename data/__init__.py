"""TFDS dataset builders: the embedded sets, and those that TFDS lacks."""
