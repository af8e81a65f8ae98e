"""ImageNet-O: images of no ImageNet-1k class, for out-of-distribution tests.

Build it from the root of the repository with

    tfds build data/imagenet_o --manual_dir=DIR

where DIR holds imagenet-o.tar, and name it in a config as
`module="data.imagenet_o"`. README.md beside this file says more, above all what
`label` means.
"""

import posixpath
import re
import tarfile
from collections.abc import Iterator

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from etils import epath
from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

_DESCRIPTION = """\
ImageNet-O: 2,000 images of classes that ImageNet-1k does not have, which a
ResNet-50 trained on ImageNet-1k nevertheless takes for one of its classes with
high confidence. They are out of distribution for models trained on ImageNet-1k.
`label` is NOT the class of the image: it is the ImageNet-1k class that the
image's folder is named after, one of 200, so no prediction for an image is
right. The authors compare with the validation images of these 200 classes.
"""

_CITATION = """\
@inproceedings{hendrycks2021natural,
  author = {Hendrycks, Dan and Zhao, Kevin and Basart, Steven and
    Steinhardt, Jacob and Song, Dawn},
  title = {Natural Adversarial Examples},
  booktitle = {CVPR},
  year = {2021},
}
"""

_ARCHIVE = "imagenet-o.tar"
_NUM_IMAGES, _NUM_CLASSES = 2000, 200
_MEMBER = re.compile(r"(?:\./)?imagenet-o/(n\d{8})/([^/]+)")


def read_archive(path: epath.Path) -> Iterator[tuple[str, str, bytes]]:
  """Reads the images of the archive one by one, in memory.

  Args:
    path: imagenet-o.tar, with the images as imagenet-o/nXXXXXXXX/NAME.

  Yields:
    The WordNet id, the name and the bytes of an image.

  Raises:
    ValueError: if the archive is damaged or was cut off, or holds anything but
      images, folders, a README.txt and files whose names begin with a dot.
  """
  try:
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
      for member in tar:
        name = posixpath.basename(member.name)
        if member.isdir() or name == "README.txt" or name.startswith("."):
          continue
        match = _MEMBER.fullmatch(member.name)
        if not match or not member.isreg():
          raise ValueError(
            f"{path} has the member {member.name!r}; wanted files "
            "imagenet-o/nXXXXXXXX/NAME"
          )
        yield *match.groups(), tar.extractfile(member).read()
      # tarfile takes any header that it cannot read for the end, which is
      # zeros.
      file.seek(tar.offset)
      end = file.read(tarfile.BLOCKSIZE)
      if len(end) < tarfile.BLOCKSIZE or end.strip(b"\0"):
        raise tarfile.ReadError(f"no member at byte {tar.offset}")
  except tarfile.TarError as e:
    raise ValueError(f"{path} is damaged or was cut off: {e}") from e


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builds the test split of ImageNet-O."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  MANUAL_DOWNLOAD_INSTRUCTIONS = """\
  imagenet-o.tar, packed, from the page
  https://github.com/hendrycks/natural-adv-examples
  """

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(None, None, 3), encoding_format="jpeg"
          ),
          "label": tfds.features.ClassLabel(
            names_file=imagenet_common.label_names_file()
          ),
          "file_name": tfds.features.Text(),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://github.com/hendrycks/natural-adv-examples",
      citation=_CITATION,
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    path = dl_manager.manual_dir / _ARCHIVE
    if not path.exists():
      raise ValueError(
        f"there is no {path}; wanted "
        + " ".join(self.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
      )
    return {"test": self._generate_examples(path)}

  def _generate_examples(self, path: epath.Path):
    classes = set(self.info.features["label"].names)
    count, used = 0, set()
    for wnid, name, data in read_archive(path):
      where = f"{path}: imagenet-o/{wnid}/{name}"
      if wnid not in classes:
        raise ValueError(f"{where}: {wnid} is no class of ImageNet-1k")
      try:
        tf.io.decode_image(data, channels=3, expand_animations=False)
      except tf.errors.InvalidArgumentError as e:
        raise ValueError(
          f"{where} cannot be decoded, and a test set wants all its images: "
          f"fetch {_ARCHIVE} again. TensorFlow says: {e.message}"
        ) from e
      count += 1
      used.add(wnid)
      # The names are not unique by themselves.
      key = f"{wnid}/{name}"
      yield key, {"image": data, "label": wnid, "file_name": name}
    if (count, len(used)) != (_NUM_IMAGES, _NUM_CLASSES):
      logging.warning(
        "%s has %d images in %d folders; the published set has %d in %d.",
        path,
        count,
        len(used),
        _NUM_IMAGES,
        _NUM_CLASSES,
      )
