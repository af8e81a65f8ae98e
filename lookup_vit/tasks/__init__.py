"""Tasks: what train.py asks of one. Each file has a class `Task(config)`.

A task has
  `augment(batch, rng)`: the batch as trained on, after mixing on the device;
  `loss(logits, out, batch)`: a scalar and a dict of scalars to log;
  `metrics(logits, out, batch)`: a dict of per-example float32 arrays
    `[batch]`, and which examples count, to be averaged over a split.
"""
