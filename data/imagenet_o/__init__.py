"""ImageNet-O from its archive, as a TFDS data set."""

from data.imagenet_o.imagenet_o_dataset_builder import Builder

__all__ = ["Builder"]
