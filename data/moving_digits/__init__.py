"""Handwritten digits that move over a canvas, as a TFDS data set."""

from data.moving_digits.moving_digits_dataset_builder import Builder

__all__ = ["Builder"]
