"""LookupViT: vision transformers that do the heavy work on few tokens."""

import time

# When the program began, but for the interpreter's own start.
START = time.monotonic()
