"""Videos in folders of classes, as a TFDS data set."""

from data.video_folder.video_folder_dataset_builder import Builder

__all__ = ["Builder"]
