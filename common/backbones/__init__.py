"""Architectures that no library we build on has, under the names of their official checkpoints. They know no method."""
