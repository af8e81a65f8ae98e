"""Preprocessing ops that make a clip, a fixed number of frames of a video.

`data["video"]` holds encoded frames, a string tensor [time], or decoded ones,
uint8 [time, height, width, 3]. A string of ops picks frames, decodes them,
treats them and unfolds them:

  sample_clip(32, 2)|decode_clip|random_crop(224)|flip_lr|unfold_clip(32)

In between, a clip is an image of many channels, [height, width, frames * 3],
frame by frame. So an image op that treats all channels alike draws once and
does the same to all frames: resizes, crops, `pad`, `flip_lr`, and `value_range`
with one number for all channels. `randaug` knows clips.

To evaluate several views of a video, clips of it and crops of these, they stand
in the channels one after another:

  temporal_views(32, 2, 4)|decode_clip|resize_small(256)|spatial_views(224, 3)
  |unfold_views(32)
"""

import tensorflow as tf

from lookup_vit.preprocess.image_ops import ImageFn
from lookup_vit.preprocess.registry import (
  Data,
  PreprocessFn,
  image_op,
  register,
)
from lookup_vit.preprocess.shared import Size, assert_fits, height_width

# As for images.
_DCT = "INTEGER_ACCURATE"


def _check_counts(**counts):
  for name, count in counts.items():
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
      raise ValueError(f"wanted a positive integer as {name}, got {count!r}")


def _get_video(data):
  """Returns `data["video"]`, or raises KeyError or ValueError."""
  if "video" not in data:
    raise KeyError(f"wanted the key 'video', the data has {sorted(data)}")
  video = data["video"]
  if (video.dtype, video.shape.rank) not in ((tf.string, 1), (tf.uint8, 4)):
    raise ValueError(
      "wanted as 'video' a string tensor [time] or uint8 [time, height, width, "
      f"3], got {video.dtype.name} of shape {video.shape}"
    )
  return video


def _pick(data, op, frames, stride, first):
  """Picks frames from `first(last)` on, `last` being the last that fits.

  `first(last)` is a number, or an array of them, of clips that are then put one
  after another.
  """
  video = _get_video(data)
  length = tf.shape(video)[0]
  some = tf.debugging.assert_positive(
    length, message=f"{op}: the video has no frames"
  )
  with tf.control_dependencies([some]):
    start = first(tf.maximum(length - (frames - 1) * stride - 1, 0))
    indices = (start[..., None] + stride * tf.range(frames)) % length
  return {**data, "video": tf.gather(video, tf.reshape(indices, [-1]))}


@register("sample_clip")
def sample_clip(frames: int, stride: int = 1) -> PreprocessFn:
  """Picks a run of frames at a uniformly random place of the video.

  A video too short for it is taken from its first frame on, and starts over
  when it ends: frame i of the clip is frame `i * stride` modulo its length.

  Args:
    frames: length of the clip.
    stride: from one frame of the clip to the next, in frames of the video.

  Returns:
    An op that replaces `data["video"]`, [time, ...], by [frames, ...]. Nothing
    is decoded. It raises tf.errors.InvalidArgumentError for a video without
    frames, KeyError if there is no `data["video"]`, and ValueError if that is
    neither encoded nor decoded frames.

  Raises:
    ValueError: if `frames` or `stride` is not a positive integer.
  """
  _check_counts(frames=frames, stride=stride)

  def fn(data: Data, seed: tf.Tensor) -> Data:
    def draw(last):
      return tf.random.stateless_uniform([], seed, 0, last + 1, tf.int32)

    return _pick(data, "sample_clip", frames, stride, draw)

  return fn


@register("central_clip")
def central_clip(frames: int, stride: int = 1) -> PreprocessFn:
  """Picks the run of frames in the middle of the video.

  Args:
    frames: as in `sample_clip`, also for a video too short.
    stride: see there.

  Returns:
    An op as that of `sample_clip`.

  Raises:
    ValueError: if `frames` or `stride` is not a positive integer.
  """
  _check_counts(frames=frames, stride=stride)

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    return _pick(data, "central_clip", frames, stride, lambda last: last // 2)

  return fn


@register("temporal_views")
def temporal_views(frames: int, stride: int, count: int) -> PreprocessFn:
  """Picks several clips, evenly spaced over the video.

  The first begins with the video's first frame and the last ends with its last
  one; a single one is `central_clip`. This is the rule of DMVR, scenic's reader
  of videos (`sample_linspace_sequence` in dmvr/processors.py of
  github.com/google-deepmind/dmvr), but that its last clip ends `stride - 1`
  frames before the end. Of a video too short for a clip, all are the same.

  Args:
    frames: length of a clip; as in `sample_clip`, also for a video too short.
    stride: see there.
    count: number of clips.

  Returns:
    An op as that of `sample_clip`, but to [count * frames, ...], clip by clip.

  Raises:
    ValueError: if an argument is not a positive integer.
  """
  _check_counts(frames=frames, stride=stride, count=count)

  def first(last):
    if count == 1:
      return last // 2
    return tf.range(count) * last // (count - 1)

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    return _pick(data, "temporal_views", frames, stride, first)

  return fn


@register("decode_clip")
def decode_clip() -> PreprocessFn:
  """Decodes a clip's frames, JPEG or PNG, and folds time into the channels.

  Returns:
    An op that replaces `data["video"]`, [frames, ...], by `data["image"]`,
    uint8 [height, width, frames * 3]. It raises
    tf.errors.InvalidArgumentError for frames that are broken or differ in size,
    KeyError if there is no `data["video"]`, and ValueError if that is neither
    encoded nor decoded frames, or is of any length.
  """

  def fn(data: Data, seed: tf.Tensor) -> Data:
    del seed
    video = _get_video(data)
    if video.shape[0] is None:
      raise ValueError(
        "decode_clip wants a fixed number of frames: put sample_clip(FRAMES), "
        "central_clip(FRAMES) or temporal_views before it"
      )
    frames = tf.unstack(video)
    if video.dtype == tf.string:
      # It reads PNG too.
      frames = [tf.io.decode_jpeg(f, 3, dct_method=_DCT) for f in frames]
    image = tf.concat(frames, axis=-1)
    others = {k: v for k, v in data.items() if k != "video"}
    return {**others, "image": image}

  return fn


@register("still_clip")
@image_op
def still_clip(frames: int) -> ImageFn:
  """Makes a clip in which nothing moves of an image.

  Args:
    frames: length of the clip.

  Returns:
    An op from [h, w, c] to [h, w, frames * c].

  Raises:
    ValueError: if `frames` is not a positive integer.
  """
  _check_counts(frames=frames)
  return lambda image, seed: tf.tile(image, [1, 1, frames])


@register("unfold_clip")
@image_op
def unfold_clip(frames: int) -> ImageFn:
  """Takes time out of the channels: the last of the ops on a clip.

  Args:
    frames: length of the clip.

  Returns:
    An op from [h, w, frames * c] to [frames, h, w, c] of the same dtype. It
    raises ValueError if the channels are not a multiple of `frames`.

  Raises:
    ValueError: if `frames` is not a positive integer.
  """
  _check_counts(frames=frames)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    del seed
    height, width, channels = image.shape
    if channels is None or channels % frames:
      raise ValueError(
        f"unfold_clip({frames}) wants a multiple of {frames} channels, got an "
        f"image of shape {image.shape}"
      )
    depth = channels // frames
    size = tf.unstack(tf.shape(image)[:2])
    clip = tf.transpose(tf.reshape(image, [*size, frames, depth]), [2, 0, 1, 3])
    return tf.ensure_shape(clip, [frames, height, width, depth])

  return fn


@register("spatial_views")
@image_op
def spatial_views(crop_size: Size, count: int = 3) -> ImageFn:
  """Crops several times, evenly spaced along the side with more room.

  Of a square crop this is the longer side: the first crop is at the left or
  top, the last at the right or bottom. A single one is `central_crop`, and so
  is the middle one of three. It is how SlowFast (arXiv:1812.03982) and ViViT
  (arXiv:2103.15691) evaluate, see `three_spatial_crops` in scenic's
  scenic/dataset_lib/video_ops.py; where the room is odd, the middle there is a
  pixel further.

  Args:
    crop_size: side of a square, or (height, width).
    count: number of crops.

  Returns:
    An op from [h, w, c] to [height, width, count * c], crop by crop. It raises
    tf.errors.InvalidArgumentError, with both sizes, if the image is smaller.

  Raises:
    ValueError: if an argument is not positive.
  """
  height, width = height_width(crop_size)
  _check_counts(count=count)

  def place(i, room):
    return room * i // (count - 1) if count > 1 else room // 2

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    del seed
    fits = assert_fits(image, (height, width), "spatial_views")
    with tf.control_dependencies([fits]):
      rows, columns = tf.unstack(tf.shape(image)[:2] - [height, width])
    crops = []
    for i in range(count):
      top = tf.where(rows > columns, place(i, rows), rows // 2)
      left = tf.where(rows > columns, columns // 2, place(i, columns))
      crop = image[top : top + height, left : left + width]
      crops.append(tf.ensure_shape(crop, [height, width, image.shape[-1]]))
    return tf.concat(crops, axis=-1)

  return fn


@register("unfold_views")
@image_op
def unfold_views(frames: int) -> ImageFn:
  """Takes views and time out of the channels: the last of the ops on views.

  After `temporal_views(frames, stride, t)` and `spatial_views(size, s)`, view
  `i * t + j` is crop i of clip j.

  Args:
    frames: length of a clip.

  Returns:
    An op from [h, w, views * frames * 3] to [views, frames, h, w, 3] of the
    same dtype. It raises ValueError if the channels are not a multiple of
    `3 * frames`.

  Raises:
    ValueError: if `frames` is not a positive integer.
  """
  _check_counts(frames=frames)

  def fn(image: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    del seed
    height, width, channels = image.shape
    if channels is None or channels % (3 * frames):
      raise ValueError(
        f"unfold_views({frames}) wants a multiple of 3 * {frames} channels, "
        f"got an image of shape {image.shape}"
      )
    views = channels // (3 * frames)
    size = tf.unstack(tf.shape(image)[:2])
    clips = tf.reshape(image, [*size, views, frames, 3])
    clips = tf.transpose(clips, [2, 3, 0, 1, 4])
    return tf.ensure_shape(clips, [views, frames, height, width, 3])

  return fn
