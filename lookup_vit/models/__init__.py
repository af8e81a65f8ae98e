"""Models: one file each, with a `Model(num_classes, variant, ...)` factory."""
