"""Ambergrade: diffusion base models into graded releases: train, merge, evaluate, release."""

__version__ = "0.1.0"
