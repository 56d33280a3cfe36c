"""Measuring models: bits per byte and loss by position."""
