"""Answers to what a guest asks its link: bytes in, bytes out, no state and no I/O."""
