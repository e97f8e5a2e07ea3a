"""Decoding and preprocessing of images and videos."""
