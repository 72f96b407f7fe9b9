"""The hierarchical loop: a plain synchronous core with three managers, and the runtime that drives it.

observe -> forecast -> decide -> record -> apply. `core.py` takes events and gives decisions and effects; it
knows no transport, database, scheduler or event loop, so the same core runs in production (`runtime.py`), in
virtual time (simulator/fleet.py) and over recorded events.
"""
