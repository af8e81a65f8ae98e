"""ImageNet-21k from its class archives, as a TFDS data set."""

from data.imagenet21k.imagenet21k_dataset_builder import Builder

__all__ = ["Builder"]
