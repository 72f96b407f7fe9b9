"""Output-length predictors: how long an answer will be, before it has begun. `port.py` is what one must do."""
