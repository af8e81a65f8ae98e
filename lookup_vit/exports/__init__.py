"""The programs that `lookup_vit.export` writes, by format."""
