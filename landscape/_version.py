"""The version, alone in a file so that building and `landscape --version` need no other import."""

__version__ = "0.1.0"
