"""A run's directory as any trainer left it: logs, settings, predictions.

When: WHEN WRONG; no torch. (The lead writes this module and artefacts.py beside it; evidence.py may call `read_run(path)`.)
"""
