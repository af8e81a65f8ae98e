"""ImageNet-21k: all of ImageNet, from the class archives of a release.

Build it from the root of the repository with

    tfds build data/imagenet21k --manual_dir=DIR

and name it in a config as `module="data.imagenet21k"`. README.md beside this
file says where the archives come from, how to lay them out in DIR, and how to
build on many machines.
"""

import collections
import itertools
import os
import posixpath
import re
import sys
import tarfile
import time
from collections.abc import Iterator, Sequence
from concurrent import futures

import tensorflow as tf
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

_DESCRIPTION = """\
ImageNet-21k: every class of ImageNet, of which ImageNet-1k is a subset. Classes
are the WordNet ids of the archives that the set was built from, in sorted
order. There is one split. It is shuffled by a hash of the file name, so that a
slice such as `train[:25600]` is a random sample. JPEG files are stored as they
are; files of other formats and CMYK images are stored as JPEG of quality 100.
Members of the archives that hold no image that TensorFlow decodes are left out:
`report.tsv`, beside the records, lists both kinds.
"""

_CITATION = """\
@inproceedings{deng2009imagenet,
  author = {Deng, Jia and Dong, Wei and Socher, Richard and Li, Li-Jia and
    Li, Kai and Fei-Fei, Li},
  title = {ImageNet: A Large-Scale Hierarchical Image Database},
  booktitle = {CVPR},
  year = {2009},
}
"""

# The classes that each release has.
_NUM_CLASSES = {"winter21": 19_167, "fall11": 21_841}
_WINTER21 = tfds.core.BuilderConfig(
  name="winter21",
  description="The release of 2021: 19,167 classes, fewer of them persons.",
)
_FALL11 = tfds.core.BuilderConfig(
  name="fall11", description="The release of 2011: 21,841 classes."
)

_ARCHIVE = re.compile(r"n\d{8}\.tar")
_REPORT = "report.tsv"
_LEFT_OUT, _RE_ENCODED = "left out", "re-encoded"
# (archive, member, what was done, why).
Row = tuple[str, str, str, str]
KeyExample = tuple[str, dict[str, str | bytes]]


def find_archives(manual_dir: epath.Path, release: str) -> list[epath.Path]:
  """Finds the class archives of a release.

  Args:
    manual_dir: holds them, or a folder `RELEASE_whole` with them.
    release: "winter21" or "fall11".

  Returns:
    The paths of the archives, one a class, sorted.

  Raises:
    ValueError: if there are none, or more than the release has.
  """
  folder = manual_dir / f"{release}_whole"
  if not folder.is_dir():
    folder = manual_dir
  paths = sorted(p for p in folder.iterdir() if _ARCHIVE.fullmatch(p.name))
  if not paths:
    wanted = (
      f"wanted the archives nXXXXXXXX.tar of {release}, one for each class, "
      f"there or in {manual_dir / f'{release}_whole'}"
    )
    for whole in sorted(manual_dir.glob(f"{release}_whole.tar*")):
      wanted += (
        f". Unpack {whole.name} into these archives, and leave them packed: "
        f"tar -xf {whole.name}"
      )
    raise ValueError(f"{folder} holds no class archives; {wanted}")
  if len(paths) > _NUM_CLASSES[release]:
    raise ValueError(
      f"{folder} holds {len(paths):,} class archives, but {release} has "
      f"{_NUM_CLASSES[release]:,}: wanted the archives of one release. "
      "`tfds build --config=` takes winter21 or fall11."
    )
  return paths


def check_archives(paths: Sequence[epath.Path]) -> None:
  """Checks head and tail of every archive, before the long work.

  Args:
    paths: the archives.

  Raises:
    ValueError: if some are no tar archives or were cut off.
  """
  errors = []
  start = last = time.monotonic()
  # Threads, for storage that answers slowly.
  with futures.ThreadPoolExecutor(16) as pool:
    for done, error in enumerate(pool.map(_archive_error, paths), 1):
      if error:
        errors.append(error)
      if time.monotonic() - last > 10:
        last = time.monotonic()
        logging.info(
          "Checked %d of %d archives in %.0f s.", done, len(paths), last - start
        )
  if errors:
    more = f"\nand {len(errors) - 10} more" if len(errors) > 10 else ""
    raise ValueError(
      f"{len(errors)} of {len(paths)} class archives are broken. Fetch them "
      "again:\n" + "\n".join(errors[:10]) + more
    )


def _archive_error(path):
  with path.open("rb") as file:
    head = file.read(tarfile.BLOCKSIZE)
    size = _size(file)
    file.seek(max(size - 2 * tarfile.BLOCKSIZE, 0))
    tail = file.read()
  if not size:
    return f"{path} is empty"
  try:
    tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
  except tarfile.HeaderError as e:
    return f"{path} is no tar archive ({e})"
  if size % tarfile.BLOCKSIZE == 0 and not tail.strip(b"\0"):
    return None
  # Without the usual end. The headers tell whether anything lacks.
  try:
    collections.deque(_members(path), maxlen=0)
  except ValueError as e:
    return str(e)
  return None


def _members(path):
  """Yields (archive, member) for all members up to the end of an archive.

  Raises:
    ValueError: if the archive is damaged or was cut off.
  """
  try:
    with (
      epath.Path(path).open("rb") as file,
      tarfile.open(fileobj=file, mode="r:") as tar,
    ):
      size = _size(file)
      for member in tar:
        # Now the offset is that of the next member.
        if tar.offset > size:
          raise tarfile.ReadError(f"it ends within {member.name}")
        yield tar, member
      # tarfile takes any header that it cannot read for the end, which is
      # zeros, and not many.
      file.seek(tar.offset)
      end = file.read(tarfile.BLOCKSIZE)
      if end.strip(b"\0") or size - tar.offset > 1 << 20:
        raise tarfile.ReadError(f"no member at byte {tar.offset} of {size}")
  except tarfile.TarError as e:
    raise ValueError(f"{path} is damaged or was cut off: {e}") from e


def _size(file):
  """Returns the size of an open file, and moves to its end."""
  file.seek(0, os.SEEK_END)
  return file.tell()


def read_archive(path: str) -> Iterator[tuple[str, bytes | str]]:
  """Reads the members of a class archive one by one, in memory.

  Args:
    path: the archive nXXXXXXXX.tar. Its images are the regular files whose
      names begin with nXXXXXXXX_, in whatever folder of the archive.

  Yields:
    The name of a member with its bytes, or with the reason why it is no image
    of the class.

  Raises:
    ValueError: if the archive is damaged or was cut off.
  """
  wnid = posixpath.basename(path).removesuffix(".tar")
  wanted = re.compile(wnid + r"_[\w.-]+", re.ASCII)
  seen = set()
  for tar, member in _members(path):
    name = posixpath.basename(member.name)
    if not member.isreg() or member.issparse():
      yield member.name, "not a regular file"
    elif not wanted.fullmatch(name):
      yield member.name, f"the name is not {wnid}_*"
    elif name in seen:
      yield member.name, "another member has this name"
    else:
      seen.add(name)
      yield member.name, tar.extractfile(member).read()


def to_jpeg(data: bytes) -> tuple[bytes, str]:
  """Decodes an image, as training would, and makes it a JPEG if it is none.

  Args:
    data: an encoded image, of any format that TensorFlow decodes.

  Returns:
    A JPEG with one or three channels, and why it is not `data`: the empty
    string if it is.

  Raises:
    tf.errors.InvalidArgumentError: if the image cannot be decoded.
  """
  if not data.startswith(b"\xff\xd8\xff"):
    image = tf.io.decode_image(data, channels=3, expand_animations=False)
    why = "not a JPEG"
  else:
    image = tf.io.decode_jpeg(data, channels=3, dct_method="INTEGER_ACCURATE")
    if tf.image.extract_jpeg_shape(data)[2] != 4:
      return data, ""
    why = "CMYK"
  jpeg = tf.io.encode_jpeg(image, quality=100, chroma_downsampling=False)
  return jpeg.numpy(), why


def to_example(
  path: str, member: str, content: bytes | str
) -> tuple[KeyExample | None, Row | None]:
  """Makes an example of a member, a row of the report, or both.

  Args:
    path: the archive.
    member: the name of a member.
    content: what `read_archive` gave for it.

  Returns:
    A key and an example, None if the member is left out; and a row of the
    report, None if the file is stored as it is.
  """
  archive, name = posixpath.basename(path), posixpath.basename(member)
  # Names may have any bytes, tabs and ends of lines among them.
  member = member.encode("unicode_escape").decode()
  if isinstance(content, str):
    return None, (archive, member, _LEFT_OUT, content)
  try:
    jpeg, why = to_jpeg(content)
  except tf.errors.InvalidArgumentError as e:
    # Between the name of the op's node and that of the op.
    reason = re.sub(r"^\{\{.*?\}\} | \[Op:.*", "", e.message.splitlines()[0])
    return None, (archive, member, _LEFT_OUT, reason)
  example = {
    "image": jpeg,
    "label": archive.removesuffix(".tar"),
    "file_name": name,
  }
  row = (archive, member, _RE_ENCODED, why) if why else None
  return (name, example), row


def write_report(rows: Sequence[Row], path: str, heading: str) -> None:
  """Writes the members that are left out or stored otherwise than they were.

  Args:
    rows: one for each, in any order.
    path: the file to write.
    heading: the first line.
  """
  lines = [f"# {heading}", "archive\tmember\taction\treason"]
  lines += ["\t".join(row) for row in sorted(rows)]
  epath.Path(path).write_text("\n".join(lines) + "\n")


def _generate_here(paths, report, heading) -> Iterator[KeyExample]:
  """Yields the examples; threads of this process decode."""
  rows = []
  threads = os.cpu_count() or 1

  def contents():
    for path in paths:
      for member, content in read_archive(path):
        yield path, member, content

  with futures.ThreadPoolExecutor(threads) as pool:
    waiting = collections.deque()
    source = contents()
    try:
      while True:
        # A few images ahead, as they are all in memory.
        for item in itertools.islice(source, 4 * threads - len(waiting)):
          waiting.append(pool.submit(to_example, *item))
        if not waiting:
          break
        example, row = waiting.popleft().result()
        if row:
          rows.append(row)
        if example:
          yield example
    finally:  # Also where TFDS wants no more examples.
      for future in waiting:
        future.cancel()
      write_report(rows, report, heading)


def _beam_generate(paths, report, heading):
  """Returns a PTransform from nothing to the examples."""
  import apache_beam as beam
  from apache_beam.internal import cloudpickle

  # Workers have TensorFlow and TFDS, but not this module.
  cloudpickle.register_pickle_by_value(sys.modules[__name__])

  def read(path):
    for member, content in read_archive(path):
      example, row = to_example(path, member, content)
      if row:
        beam.metrics.Metrics.counter("imagenet21k", row[2]).inc()
        yield beam.pvalue.TaggedOutput("rows", row)
      if example:
        yield example

  @beam.ptransform_fn
  def generate(pipeline):
    outputs = (
      pipeline
      | "Archives" >> beam.Create(paths)
      | beam.Reshuffle()
      | "Read" >> beam.FlatMap(read).with_outputs("rows", main="examples")
    )
    _ = (
      outputs.rows
      | beam.combiners.ToList()
      | "Report" >> beam.Map(write_report, path=report, heading=heading)
    )
    return outputs.examples

  return generate()


class Builder(tfds.core.GeneratorBasedBuilder):
  """Builds ImageNet-21k: with Beam if options for it are given, else here."""

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "Initial release."}
  # `tfds build` without `--config` builds all that are here.
  BUILDER_CONFIGS = [_WINTER21]
  MANUAL_DOWNLOAD_INSTRUCTIONS = """\
  The class archives nXXXXXXXX.tar of a release from
  https://image-net.org/download-images (after registration), one for each
  class, in the manual directory or in its folder winter21_whole (fall11_whole
  for the config fall11). Unpack the one big archive of the release, and leave
  the class archives packed.
  """

  @classmethod
  def get_builder_config(cls, name, version=None):
    """Finds a config by name, also the one that is only built on request."""
    if name == _FALL11.name:
      return _FALL11
    return super().get_builder_config(name, version)

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description=_DESCRIPTION,
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(
            shape=(None, None, 3), encoding_format="jpeg"
          ),
          # Its names are those of the archives; TFDS keeps them with the data.
          "label": tfds.features.ClassLabel(),
          "file_name": tfds.features.Text(),
        }
      ),
      supervised_keys=("image", "label"),
      homepage="https://image-net.org",
      citation=_CITATION,
    )

  def _download_and_prepare(self, dl_manager, download_config):
    # TFDS does not tell `_split_generators` what will run its generators.
    self._use_beam = (
      download_config.beam_options is not None
      or download_config.beam_runner is not None
    )
    super()._download_and_prepare(dl_manager, download_config)

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    release = self.builder_config.name
    archives = find_archives(dl_manager.manual_dir, release)
    heading = (
      f"{release}: {len(archives):,} of the release's "
      f"{_NUM_CLASSES[release]:,} classes"
    )
    complete = len(archives) == _NUM_CLASSES[release]
    log = logging.info if complete else logging.warning
    log("Archives in %s: %s.", archives[0].parent, heading)
    check_archives(archives)
    self.info.features["label"].names = [
      path.name.removesuffix(".tar") for path in archives
    ]
    paths = [os.fspath(path) for path in archives]
    return {
      "train": self._generate_examples(
        paths, os.fspath(self.data_path / _REPORT), heading
      )
    }

  def _generate_examples(self, paths, report, heading):
    if self._use_beam:
      return _beam_generate(paths, report, heading)
    return _generate_here(paths, report, heading)

  def _post_download_and_prepare_hook(self):
    report = self.data_path / _REPORT
    actions = collections.Counter(
      line.split("\t")[2] for line in report.read_text().splitlines()[2:]
    )
    logging.warning(
      "Members of the archives that are left out: %d; stored as JPEG though "
      "they were not: %d. %s lists them.",
      actions[_LEFT_OUT],
      actions[_RE_ENCODED],
      report,
    )
