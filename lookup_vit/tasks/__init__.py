"""Tasks: what train.py asks of one. Each file has a class `Task(config)`.

A task has
  `batch_shapes(size)`: a training batch, as the input pipeline makes it, by
    shapes;
  `check_input(spec, field)`: raises ValueError unless batches of such shapes,
    made by a config field, are of the task;
  `inputs(batch)`: the arguments that the model is called with;
  `augment(batch, first, rng)`: the batch as trained on, after mixing; it is
    called for the part of the global batch that one device has, which begins
    with example `first` of it;
  `group`: so many neighbours in the batch are mixed and stay on one device;
  `loss(logits, out, batch)`: a scalar and a dict of scalars to log;
  `metrics(logits, out, batch)`: a dict of per-example float32 arrays
    `[batch]`, and which examples count, to be averaged over a split.
"""
