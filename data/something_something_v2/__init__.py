"""Something-Something v2, as a TFDS data set."""

from data.something_something_v2.something_something_v2_dataset_builder import (
  Builder,
  SomethingSomethingConfig,
)

__all__ = ["Builder", "SomethingSomethingConfig"]
