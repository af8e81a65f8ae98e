"""Captions to ids and back, by a SentencePiece model.

A model is a file that SentencePiece has trained: one's own, made by
`python -m lookup_vit.preprocess.train_tokenizer`, or one of others, such as
the c4_en of T5 and big_vision
(gs://t5-data/vocabs/cc_en.32000/sentencepiece.model).
"""

import functools
from collections.abc import Iterable

import ml_collections
import numpy as np
from etils import epath

from lookup_vit import config_utils

# In a work directory, a copy of the model that the run was trained with.
_FILE = "tokenizer.model"


class Tokenizer:
  """A SentencePiece model.

  Args:
    path: of the model file, here or on `gs://`.

  Attributes:
    path: likewise.
    content: the file, as bytes.
    size: of the vocabulary.
    begin: id that stands before a caption: that of the model's begin, or where
      it has none its padding, as in T5, or its end.
    end: id that ends a caption.

  Raises:
    ValueError: there is no such file, it is no SentencePiece model, or the
      model has no id for the end; or SentencePiece is not installed.
  """

  def __init__(self, path: str):
    try:
      import sentencepiece
    except ModuleNotFoundError:
      raise ValueError(
        "Captions want the package sentencepiece: pip install "
        "'lookup_vit[captions]'."
      ) from None
    self.path = path
    file = epath.Path(path).expanduser()
    if not path or not file.is_file():
      raise ValueError(
        f"tokenizer {path!r}: there is no such file; want a SentencePiece "
        "model. python -m lookup_vit.preprocess.train_tokenizer makes one."
      )
    self.content = file.read_bytes()
    self._model = sentencepiece.SentencePieceProcessor()
    try:
      self._model.LoadFromSerializedProto(self.content)
    except RuntimeError:
      raise ValueError(
        f"tokenizer {path!r} is no SentencePiece model, or a damaged one."
      ) from None
    self.size = self._model.GetPieceSize()
    self.end = self._model.eos_id()
    if self.end < 0:
      raise ValueError(f"tokenizer {path!r} has no id for the end (eos_id).")
    ids = self._model.bos_id(), self._model.pad_id(), self.end
    self.begin = next(i for i in ids if i >= 0)

  def encode(self, text: str) -> list[int]:
    """The ids of a text, without begin and end."""
    return self._model.EncodeAsIds(text)

  def decode(self, ids: Iterable[int]) -> str:
    """The text of ids, up to the first end."""
    found = []
    for i in np.asarray(ids).tolist():
      if i == self.end:
        break
      found.append(i)
    return self._model.DecodeIds(found)


def load(path: str) -> Tokenizer:
  """A `Tokenizer`; of the same file the same one."""
  file = epath.Path(path).expanduser()
  return _load(path, file.read_bytes() if path and file.is_file() else None)


@functools.lru_cache
def _load(path, content):
  del content  # Of another one at the same place.
  return Tokenizer(path)


def of_config(config: ml_collections.ConfigDict) -> Tokenizer | None:
  """The tokenizer of a config, if it has one; sets `num_classes` if it is None.

  Raises:
    ValueError: it cannot be read, or its vocabulary has another size than the
      config.
  """
  if config.tokenizer is None:
    return None
  with config_utils.at_fault("config.tokenizer"):
    words = load(config.tokenizer)
  if config.num_classes is None:
    config.num_classes = words.size
  if config.num_classes != words.size:
    raise ValueError(
      f"config.tokenizer={config.tokenizer!r} has {words.size} pieces, "
      f"config.num_classes is {config.num_classes}."
    )
  return words


def of_workdir(workdir: str) -> str:
  """Path of a work directory's tokenizer."""
  return str(config_utils.workdir_path(workdir) / _FILE)


def check_workdir(workdir: str, words: Tokenizer) -> None:
  """Raises ValueError where a work directory has another tokenizer."""
  path = epath.Path(of_workdir(workdir))
  if path.exists() and path.read_bytes() != words.content:
    raise ValueError(
      f"config.tokenizer={words.path!r} is not the one that {workdir} was "
      f"trained with, {path}. Choose another work directory, or that tokenizer."
    )


def write(workdir: str, words: Tokenizer) -> None:
  """Writes a tokenizer into a work directory."""
  epath.Path(of_workdir(workdir)).write_bytes(words.content)
