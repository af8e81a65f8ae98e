"""Captions of scenes of handwritten digits, as a TFDS data set."""

from data.digit_captions.digit_captions_dataset_builder import Builder

__all__ = ["Builder"]
