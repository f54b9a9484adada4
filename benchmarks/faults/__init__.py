"""Injected faults of user-style code, and healthy set-ups: what the doctor must name, and what it must leave alone.

Whoever wrote these files had read the catalogue and no line of the doctor. The folders say when: `first` was written
before the checks of its rows were known to its author, and is not edited afterwards; `second` followed. `homes` holds the
healthy user code in several hands that faults are cut from, `healthy` the set-ups that must get no alarm.
"""
