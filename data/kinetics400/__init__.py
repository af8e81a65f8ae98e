"""Kinetics-400, as a TFDS data set."""

from data.kinetics400.kinetics400_dataset_builder import Builder, KineticsConfig

__all__ = ["Builder", "KineticsConfig"]
