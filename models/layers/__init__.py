"""Blocks that several architectures share; each is defined once, here."""
