"""LookupViT: vision transformers that do the heavy work on few tokens."""
