"""Tiny look-alikes of the files that ImageNet-21k and ImageNet-O come as.

    files = imagenet_files.write_imagenet21k(manual_dir, classes=3)

writes class archives that `tfds build data/imagenet21k` takes, and returns what
is in them. Images are JPEGs of smooth colours with sides of 40 to 90 pixels.
"""

import io
import os
import pathlib
import tarfile
from collections.abc import Mapping

import numpy as np
from PIL import Image


def picture(rng: np.random.Generator, mode: str = "RGB") -> Image.Image:
  """Draws colours that change smoothly, which JPEG keeps well."""
  width, height = rng.integers(40, 90, 2).tolist()
  corners = rng.integers(0, 256, (3, 3, 3), np.uint8)
  image = Image.fromarray(corners).resize((width, height), Image.BICUBIC)
  return image.convert(mode)


def encode(image: Image.Image, file_format: str = "JPEG") -> bytes:
  """Encodes an image in a format that Pillow knows by name."""
  buffer = io.BytesIO()
  image.save(buffer, file_format)
  return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
  """Adds a file to an archive, under any name."""
  member = tarfile.TarInfo(name)
  member.size = len(data)
  tar.addfile(member, io.BytesIO(data))


def write_tar(path: str | os.PathLike, files: Mapping[str, bytes]) -> None:
  """Writes an archive of files by their names."""
  with tarfile.open(path, "w") as tar:
    for name, data in files.items():
      add(tar, name, data)


def write_imagenet21k(
  manual_dir: str | os.PathLike,
  classes: int = 3,
  per_class: int = 7,
  seed: int = 0,
) -> dict[str, dict[str, bytes]]:
  """Writes class archives of ImageNet-21k.

  Args:
    manual_dir: where to, as `tfds build --manual_dir` wants it.
    classes: number of archives.
    per_class: number of images in each.
    seed: of the images.

  Returns:
    For each WordNet id, in sorted order, its files' bytes by their names.
  """
  manual_dir = pathlib.Path(manual_dir)
  manual_dir.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  out = {}
  for i in range(classes):
    wnid = f"n{1440764 + 37 * i:08}"
    # Numbers of ImageNet's files have gaps.
    numbers = (10 + 13 * j for j in range(per_class))
    out[wnid] = {f"{wnid}_{n}.JPEG": encode(picture(rng)) for n in numbers}
    write_tar(manual_dir / f"{wnid}.tar", out[wnid])
  return out


def write_imagenet_o(
  manual_dir: str | os.PathLike,
  classes: int = 3,
  per_class: int = 5,
  seed: int = 0,
) -> dict[str, dict[str, bytes]]:
  """Writes imagenet-o.tar.

  Args:
    manual_dir: where to, as `tfds build --manual_dir` wants it.
    classes: number of folders, at most 5.
    per_class: number of images in each.
    seed: of the images.

  Returns:
    For each folder's WordNet id, in sorted order, its files' bytes by their
    names. The names are the same in all folders.
  """
  manual_dir = pathlib.Path(manual_dir)
  manual_dir.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  # Some of the 200 classes of the published set.
  wnids = ("n01443537", "n01704323", "n02666196", "n03717622", "n13052670")
  names = [f"photo ({i}).JPEG" for i in range(per_class)]
  out = {
    wnid: {name: encode(picture(rng)) for name in names}
    for wnid in wnids[:classes]
  }
  with tarfile.open(manual_dir / "imagenet-o.tar", "w") as tar:
    add(tar, "imagenet-o/README.txt", b"The ImageNet-O dataset")
    for wnid, files in out.items():
      folder = tarfile.TarInfo(f"imagenet-o/{wnid}")
      folder.type = tarfile.DIRTYPE
      tar.addfile(folder)
      for name, data in files.items():
        add(tar, f"imagenet-o/{wnid}/{name}", data)
  return out
