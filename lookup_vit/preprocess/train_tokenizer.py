r"""Trains a SentencePiece model on the captions that a config trains on.

    python -m lookup_vit.preprocess.train_tokenizer \
        --config=configs/coco_caption_lookup_b.py \
        --vocab_size=8000 --output=workdirs/coco.model

The numbers of padding, end and unknown are 0, 1 and 2, as those of T5; there is
no begin.
"""

import io
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from absl import flags
from etils import epath

from lookup_vit import (
  cli,
  config_utils,
  descriptions,
  input_pipeline,
  tokenizer,
)

FLAGS = flags.FLAGS

log = logging.getLogger("lookup_vit")


def train(
  captions: Iterable[str],
  vocab_size: int,
  model_type: str = "unigram",
  normalization: str = "nmt_nfkc",
) -> bytes:
  """A SentencePiece model; the same for the same captions.

  Args:
    captions: to train on; blank ones are left out.
    vocab_size: number of pieces.
    model_type: "unigram", "bpe", "word" or "char".
    normalization: SentencePiece's rule for characters; "identity" changes none,
      and makes a file of a few kilobytes instead of 240.

  Returns:
    The content of the model's file.

  Raises:
    ValueError: there are no captions, or they do not give so many pieces, or
      need more; or SentencePiece is not installed.
  """
  try:
    import sentencepiece
  except ModuleNotFoundError:
    raise ValueError(
      "Tokenizers want the package sentencepiece: pip install "
      "'lookup_vit[captions]'."
    ) from None
  # A piece spans no line.
  lines = [" ".join(c.split()) for c in captions if c.strip()]
  if not lines:
    raise ValueError("There are no captions to train a tokenizer on.")
  model = io.BytesIO()
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(lines),
      model_writer=model,
      vocab_size=vocab_size,
      model_type=model_type,
      normalization_rule_name=normalization,
      pad_id=0,
      eos_id=1,
      unk_id=2,
      bos_id=-1,
      num_threads=1,
      minloglevel=2,
    )
  except (RuntimeError, OSError) as e:
    reason = str(e).rpartition("] ")[2].strip() or str(e)
    raise ValueError(
      f"vocab_size={vocab_size}, model_type={model_type!r}: {reason}"
    ) from e
  return model.getvalue()


def captions_of(
  data: Mapping[str, Any], key: str, lower: bool
) -> Iterator[str]:
  """The captions of a data set, or of all those of a mixture.

  Raises:
    ValueError: the data cannot be read, or have no such feature of texts.
  """
  for description, _, _ in descriptions.mixture(data):
    pp = f"flatten|keep({key!r})"
    for example in input_pipeline.examples(description, pp=pp):
      with config_utils.at_fault("--key"):
        texts = input_pipeline.texts(example, key)
      for text in texts:
        yield text.lower() if lower else text


def main(argv):
  """Trains by the flags, and says how long captions are in pieces."""
  del argv
  output = epath.Path(FLAGS.output).expanduser()
  config = config_utils.load(FLAGS.config)
  with config_utils.at_fault("config.input.data"):
    captions = list(
      captions_of(config.input.data.to_dict(), FLAGS.key, FLAGS.lower)
    )
  content = train(
    captions, FLAGS.vocab_size, FLAGS.model_type, FLAGS.normalization
  )
  output.parent.mkdir(parents=True, exist_ok=True)
  output.write_bytes(content)
  words = tokenizer.Tokenizer(str(output))
  lengths = sorted(len(words.encode(c)) + 1 for c in captions)
  log.info(
    "%d pieces from %d captions: %s. With their end captions have %d pieces "
    "(median), %d (99 %%) or %d (the longest).",
    words.size,
    len(captions),
    output,
    lengths[len(lengths) // 2],
    lengths[len(lengths) * 99 // 100],
    lengths[-1],
  )


if __name__ == "__main__":
  flags.DEFINE_string("config", None, "configs/NAME.py[:ARGS]", required=True)
  flags.DEFINE_string("output", None, "The model's file.", required=True)
  flags.DEFINE_integer("vocab_size", 8000, "Number of pieces.")
  flags.DEFINE_enum(
    "model_type", "unigram", ["unigram", "bpe", "word", "char"], "See above."
  )
  flags.DEFINE_string("normalization", "nmt_nfkc", "Or nfkc, identity, ...")
  flags.DEFINE_string("key", "captions/text", "Feature with the captions.")
  flags.DEFINE_bool("lower", True, "Lower-cases captions, as the configs do.")
  cli.run(main)
