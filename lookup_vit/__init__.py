"""LookupViT: vision transformers that do the heavy work on few tokens."""

import time

__version__ = "0.1.0"

# When the program began, but for the interpreter's own start.
START = time.monotonic()
