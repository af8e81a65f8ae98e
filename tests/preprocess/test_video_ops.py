"""Video ops against NumPy, and against image ops on each frame."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import collections

import numpy as np
import pytest
import tensorflow as tf

from lookup_vit.preprocess import get_preprocess_fn

SEED = tf.constant([7, 11])


def pictures(count, height=47, width=61, seed=0):
  """Smooth frames of odd size, all different: uint8 [count, h, w, 3]."""
  rng = np.random.default_rng(seed)
  small = rng.integers(0, 256, (count, 4, 5, 3)).astype(np.float32)
  frames = tf.image.resize(small, (height, width), "bilinear")
  return tf.cast(frames, tf.uint8).numpy()


def encode(frames, encoder=tf.io.encode_jpeg):
  return [encoder(frame).numpy() for frame in frames]


def apply(pp, seed=SEED, **data):
  data = {key: tf.constant(value) for key, value in data.items()}
  return get_preprocess_fn(pp)(data, seed)


def names(count):
  """A video whose frames cannot be decoded, but be told apart."""
  return [f"frame {i}".encode() for i in range(count)]


# --- Which frames


def picked(pp, count, seed=SEED):
  """The indices of the frames that an op picks of `count`."""
  video = apply(pp, seed, video=names(count))["video"]
  return [int(name.split()[1]) for name in video.numpy()]


@pytest.mark.parametrize(
  ("pp", "count", "want"),
  [
    ("central_clip(4)", 9, [2, 3, 4, 5]),
    ("central_clip(4)", 10, [3, 4, 5, 6]),
    ("central_clip(3, stride=2)", 9, [2, 4, 6]),
    ("central_clip(3, 4)", 9, [0, 4, 8]),
    ("central_clip(4)", 4, [0, 1, 2, 3]),
    ("central_clip(1, 5)", 3, [1]),
    # Too short: from the first frame, and again.
    ("central_clip(5)", 3, [0, 1, 2, 0, 1]),
    ("central_clip(4, 2)", 5, [0, 2, 4, 1]),
    ("central_clip(4, 3)", 3, [0, 0, 0, 0]),
    ("central_clip(3)", 1, [0, 0, 0]),
    ("sample_clip(5)", 3, [0, 1, 2, 0, 1]),
    ("sample_clip(4, 2)", 5, [0, 2, 4, 1]),
    ("sample_clip(4)", 4, [0, 1, 2, 3]),
    ("sample_clip(3, 4)", 9, [0, 4, 8]),
  ],
)
def test_frames_of_a_clip(pp, count, want):
  assert picked(pp, count) == want


def test_a_random_clip_is_a_run_at_any_place_alike():
  fn = get_preprocess_fn("sample_clip(3, 2)")
  video = tf.constant(names(11))
  clips = tf.data.Dataset.range(700).map(
    lambda i: fn({"video": video}, tf.stack([i, 0]))["video"]
  )
  counts = collections.Counter()
  for clip in clips.as_numpy_iterator():
    start = int(clip[0].split()[1])
    assert list(clip) == names(11)[start : start + 5 : 2]
    counts[start] += 1
  assert sorted(counts) == list(range(7))
  # 100 each; a standard deviation is 9.3.
  assert all(60 < n < 140 for n in counts.values())


def test_a_random_clip_is_a_function_of_the_seed():
  runs = [
    [picked("sample_clip(2)", 1000, [seed, 3]) for seed in range(5)]
    for _ in range(2)
  ]
  assert runs[0] == runs[1]
  assert len({tuple(clip) for clip in runs[0]}) == 5


@pytest.mark.parametrize("pp", ["sample_clip(4, 2)", "central_clip(4, 2)"])
def test_decoded_frames_and_other_features(pp):
  frames = pictures(12)
  got = apply(pp, video=frames, label=3)
  indices = picked(pp, 12)
  np.testing.assert_array_equal(got["video"], frames[indices])
  assert got["label"] == 3


@pytest.mark.parametrize(
  ("pp", "count", "want"),
  [
    (
      "temporal_views(3, 1, 4)",
      9,
      [[0, 1, 2], [2, 3, 4], [4, 5, 6], [6, 7, 8]],
    ),
    ("temporal_views(3, 2, 3)", 11, [[0, 2, 4], [3, 5, 7], [6, 8, 10]]),
    ("temporal_views(3, 2, 2)", 6, [[0, 2, 4], [1, 3, 5]]),
    ("temporal_views(2, 1, 4)", 3, [[0, 1], [0, 1], [0, 1], [1, 2]]),
    # Too short: all the same.
    ("temporal_views(3, 2, 3)", 4, [[0, 2, 0]] * 3),
    ("temporal_views(2, 1, 3)", 1, [[0, 0]] * 3),
  ],
)
def test_clips_of_views_are_evenly_spaced(pp, count, want):
  assert picked(pp, count) == [i for clip in want for i in clip]


@pytest.mark.parametrize("count", [1, 5, 8, 12, 40])
def test_views_against_their_rule(count):
  for frames, stride, clips in [(4, 1, 4), (3, 3, 7), (5, 2, 2), (6, 2, 1)]:
    last = max(count - (frames - 1) * stride - 1, 0)
    # As in DMVR: evenly spaced numbers without their fractions.
    starts = np.linspace(0, last, clips) if clips > 1 else [last // 2]
    starts = np.floor(np.asarray(starts) + 1e-6).astype(int)
    want = [(s + stride * i) % count for s in starts for i in range(frames)]
    assert picked(f"temporal_views({frames}, {stride}, {clips})", count) == want
  central = picked("central_clip(4, 2)", count)
  assert picked("temporal_views(4, 2, 1)", count) == central


@pytest.mark.parametrize(
  "op", ["sample_clip(2)", "central_clip(2)", "temporal_views(2, 1, 3)"]
)
@pytest.mark.parametrize(
  "video", [np.zeros([0], object), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_no_frames(op, video):
  fn = get_preprocess_fn(op)
  video = tf.constant(video, tf.string if video.ndim == 1 else tf.uint8)
  match = f"{op.partition('(')[0]}: the video has no frames"
  with pytest.raises(tf.errors.InvalidArgumentError, match=match):
    fn({"video": video}, SEED)
  # As the input runs it.
  ds = tf.data.Dataset.from_tensors({"video": video})
  ds = ds.map(lambda data: fn(data, SEED))
  with pytest.raises(tf.errors.InvalidArgumentError, match=match):
    list(ds)


# --- Decoding


@pytest.mark.parametrize("encoder", [tf.io.encode_jpeg, tf.io.encode_png])
def test_a_clip_is_its_frames_decoded_as_images_are(encoder):
  video = encode(pictures(5), encoder)
  got = apply("decode_clip|unfold_clip(5)", video=video, label=3)
  assert sorted(got) == ["image", "label"]
  want = [apply("decode", image=frame)["image"] for frame in video]
  assert got["image"].dtype == tf.uint8
  np.testing.assert_array_equal(got["image"], want)


def test_time_is_folded_into_the_channels():
  frames = pictures(4)
  image = apply("decode_clip", video=frames)["image"].numpy()
  assert image.shape == (47, 61, 12)
  for i, frame in enumerate(frames):
    np.testing.assert_array_equal(image[..., 3 * i : 3 * i + 3], frame)


def test_grey_frames_become_colour():
  frames = pictures(2)[..., :1]
  got = apply("decode_clip|unfold_clip(2)", video=encode(frames))["image"]
  assert got.shape == (2, 47, 61, 3)
  np.testing.assert_array_equal(got[..., :1], got[..., 1:2])


def test_no_other_frame_is_decoded():
  video = encode(pictures(9))
  want = apply("decode_clip", video=video[3:6])["image"]
  for i in (0, 1, 2, 6, 7, 8):
    video[i] = b"no image"
  got = apply("central_clip(3)|decode_clip", video=video)["image"]
  np.testing.assert_array_equal(got, want)
  video[4] = b"no image"
  with pytest.raises(tf.errors.InvalidArgumentError):
    apply("central_clip(3)|decode_clip", video=video)


def test_frames_that_differ_in_size_fail():
  video = encode(pictures(2)) + encode(pictures(1, 20, 20))
  with pytest.raises(tf.errors.InvalidArgumentError):
    apply("decode_clip", video=video)


# --- Image ops on clips

SPATIAL = [
  "resize_small(24)",
  "resize_small(90)",
  "resize((20, 30))",
  "resize((20, 30), 'bicubic', True)",
  "inception_crop",
  "inception_crop(16)",
  "inception_crop((24, 20), 30, antialias=True)",
  "central_crop((30, 17))",
  "random_crop((30, 17))",
  "pad(64)",
  "flip_lr",
  "value_range(-1, 1)",
  "value_range(0, 1, 10, 200, True)",
]


@pytest.mark.parametrize("op", SPATIAL)
def test_an_op_treats_all_frames_as_it_treats_one(op):
  video = encode(pictures(3))
  clip = get_preprocess_fn(f"decode_clip|{op}|unfold_clip(3)")
  # The op is second in both, so that its seed is the same.
  still = get_preprocess_fn(f"decode|{op}")
  for seed in range(6):
    seed = tf.constant([seed, 5])
    got = clip({"video": tf.constant(video)}, seed)["image"]
    want = [still({"image": tf.constant(v)}, seed)["image"] for v in video]
    assert got.dtype == want[0].dtype
    assert got.shape == (3, *want[0].shape)
    # Other kernels run on three channels than on many.
    error = np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32))
    assert error.max() <= (1 if got.dtype == tf.uint8 else 1e-6)
    assert error.mean() < 0.01


def test_flips_happen_in_half_of_the_clips_and_whole():
  frames = pictures(2)
  fn = get_preprocess_fn("decode_clip|flip_lr|unfold_clip(2)")
  flipped = 0
  for seed in range(40):
    got = fn({"video": tf.constant(frames)}, [seed, 0])["image"].numpy()
    same = (got == frames).all()
    assert same or (got == frames[:, :, ::-1]).all()
    flipped += not same
  assert 10 < flipped < 30


def test_a_still_clip_repeats_the_image():
  [image] = pictures(1)
  got = apply("still_clip(4)|unfold_clip(4)", image=image)["image"]
  np.testing.assert_array_equal(got, np.stack([image] * 4))


def test_the_shape_is_known_before_anything_is_read():
  spec = {"video": tf.TensorSpec([None], tf.string)}
  fn = get_preprocess_fn(
    "sample_clip(4)|decode_clip|random_crop((6, 5))|unfold_clip(4)"
  )
  graph = tf.function(lambda data: fn(data, SEED)).get_concrete_function(spec)
  assert graph.structured_outputs["image"].shape == (4, 6, 5, 3)


# --- Views


def crops(image, height, width, count):
  """NumPy's version of `spatial_views`: [count, height, width, c]."""
  rows, columns = image.shape[0] - height, image.shape[1] - width
  found = []
  for i in range(count):
    share = i / (count - 1) if count > 1 else 0.5
    top = int(rows * (share if rows > columns else 0.5))
    left = int(columns * (0.5 if rows > columns else share))
    found.append(image[top : top + height, left : left + width])
  return np.stack(found)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(
  ("size", "crop"),
  [
    ((47, 61), (40, 40)),
    ((61, 47), (40, 40)),
    ((50, 50), (41, 41)),
    ((47, 47), (47, 47)),
    ((60, 61), (30, 40)),
  ],
)
def test_crops_of_views(size, crop, count):
  image = np.random.default_rng(0).integers(0, 256, (*size, 4), np.uint8)
  got = apply(f"spatial_views({crop}, {count})", image=image)["image"]
  assert got.shape == (*crop, count * 4)
  got = got.numpy().reshape(*crop, count, 4).transpose(2, 0, 1, 3)
  np.testing.assert_array_equal(got, crops(image, *crop, count))
  central = apply(f"central_crop({crop})", image=image)["image"]
  if count % 2:
    np.testing.assert_array_equal(got[count // 2], central)


def test_crops_of_views_must_fit():
  image = np.zeros((20, 30, 3), np.uint8)
  with pytest.raises(tf.errors.InvalidArgumentError, match="spatial_views"):
    apply("spatial_views(24)", image=image)


@pytest.mark.parametrize("size", [(47, 61), (61, 47)])
def test_views_are_ordered_by_crop_and_then_by_clip(size):
  video = pictures(9, *size)
  pp = "temporal_views(3, 2, 2)|decode_clip|spatial_views(40)|unfold_views(3)"
  got = apply(pp, video=video, label=3)
  assert got["label"] == 3
  assert got["image"].shape == (6, 3, 40, 40, 3)
  view = 0
  for crop in range(3):
    for start in (0, 4):
      want = [
        crops(frame, 40, 40, 3)[crop] for frame in video[start : start + 5 : 2]
      ]
      np.testing.assert_array_equal(got["image"][view], want)
      view += 1


def test_one_view_is_the_central_clip():
  video = encode(pictures(9))
  views = "temporal_views(3, 2, 1)|decode_clip|spatial_views(40, 1)"
  clip = "central_clip(3, 2)|decode_clip|central_crop(40)|unfold_clip(3)"
  got = apply(f"{views}|unfold_views(3)", video=video)["image"]
  np.testing.assert_array_equal(got[0], apply(clip, video=video)["image"])


def test_the_shape_of_views_is_known_before_anything_is_read():
  spec = {"video": tf.TensorSpec([None], tf.string)}
  fn = get_preprocess_fn(
    "temporal_views(4, 2, 2)|decode_clip|resize_small(9)|spatial_views((6, 5))"
    "|unfold_views(4)|value_range(-1, 1)"
  )
  graph = tf.function(lambda data: fn(data, SEED)).get_concrete_function(spec)
  assert graph.structured_outputs["image"].shape == (6, 4, 6, 5, 3)


# --- What is refused


@pytest.mark.parametrize(
  ("pp", "match"),
  [
    ("sample_clip(0)", "positive integer as frames, got 0"),
    ("sample_clip(4, -1)", "positive integer as stride, got -1"),
    ("central_clip(2.0)", r"positive integer as frames, got 2\.0"),
    ("central_clip(True)", "positive integer as frames, got True"),
    ("still_clip(0)", "positive integer as frames, got 0"),
    ("temporal_views(4, 0, 3)", "positive integer as stride, got 0"),
    ("temporal_views(4, 1, 0)", "positive integer as count, got 0"),
    ("temporal_views(4, 1)", "missing a required argument: 'count'"),
    ("spatial_views(0)", "positive integer or a pair"),
    ("spatial_views(8, 0)", "positive integer as count, got 0"),
    ("unfold_views(0)", "positive integer as frames, got 0"),
    ("unfold_clip('4')", "positive integer as frames, got '4'"),
    ("sample_clip", "missing a required argument"),
  ],
)
def test_wrong_arguments(pp, match):
  with pytest.raises(ValueError, match=match):
    get_preprocess_fn(pp)


@pytest.mark.parametrize("op", ["sample_clip(2)", "decode_clip"])
def test_wrong_videos(op):
  with pytest.raises(ValueError, match=r"'video', the data has \['image'\]"):
    apply(op, image=b"")
  with pytest.raises(ValueError, match=r"float32 of shape \(2, 4, 4, 3\)"):
    apply(op, video=np.zeros((2, 4, 4, 3), np.float32))
  with pytest.raises(ValueError, match=r"string of shape \(\)"):
    apply(op, video=b"frame")


def test_decode_clip_wants_a_clip():
  spec = {"video": tf.TensorSpec([None], tf.string)}
  fn = get_preprocess_fn("decode_clip")
  with pytest.raises(ValueError, match=r"put sample_clip\(FRAMES\)"):
    tf.function(lambda data: fn(data, SEED)).get_concrete_function(spec)


@pytest.mark.parametrize(
  "op", ["flip_lr", "resize(4)", "resize_small(4)", "random_crop(2)", "pad(9)"]
)
def test_ops_on_frames_come_before_unfolding(op):
  image = np.zeros((5, 6, 9), np.uint8)
  name = op.partition("(")[0]
  with pytest.raises(ValueError, match=f"{name} wants .*before unfold_clip"):
    apply(f"unfold_clip(3)|{op}", image=image)


def test_unfold_clip_wants_channels_that_fit():
  with pytest.raises(ValueError, match=r"multiple of 4 channels.*\(5, 6, 9\)"):
    apply("unfold_clip(4)", image=np.zeros((5, 6, 9), np.uint8))


def test_unfold_views_wants_whole_clips():
  for channels in (13, 15):
    with pytest.raises(ValueError, match=rf"3 \* 4 channels.*6, {channels}\)"):
      apply("unfold_views(4)", image=np.zeros((5, 6, channels), np.uint8))
