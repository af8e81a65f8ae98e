"""Handwritten digits from scikit-learn, as a TFDS data set."""

from data.digits.digits_dataset_builder import Builder

__all__ = ["Builder"]
