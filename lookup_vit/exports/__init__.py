"""What `lookup_vit.export` writes, in each of its formats."""
