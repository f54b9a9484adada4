"""Saved weights and their companions: adapters, bases, merged models, processors; headers only.

When: WHEN WRONG; no torch. (The lead writes this module; evidence.py may call `read_artefacts(value)`.)
"""
