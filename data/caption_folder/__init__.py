"""Images with captions, annotated as COCO's are, as a TFDS data set."""

from data.caption_folder.caption_folder_dataset_builder import Builder

__all__ = ["Builder"]
