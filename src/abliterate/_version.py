"""The version of this package, by itself: whoever needs it imports no more."""

__version__ = "0.1.0"
