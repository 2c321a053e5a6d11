"""Backends: every operation on a backend's arrays. `protocol.py` says how to write one."""
