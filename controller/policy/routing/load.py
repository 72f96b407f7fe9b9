"""What a request adds to an instance's load: the one measure that gateways, calibration and the twin share."""

from __future__ import annotations

from math import inf

from controller.domain.classes import ClassGroup
from controller.profile.table import Profile

# Prompt tokens that still wait for their first answer weigh as requests in flight do where both use up the SLO alike:
# about 5,000 of them (50 us each on a TP8 instance of a 70B model) are the 250 ms of a short prompt's first token, and
# about 50 requests in the batch are the knee at which the time between tokens ends the capacity.
PROMPT_TOKENS_PER_REQUEST = 100.0


def load_of(held: int, pending_tokens: int) -> float:
    """Load of an instance in requests, with the next one counted, so that of two empty ones the larger is taken."""
    return held + 1 + pending_tokens / PROMPT_TOKENS_PER_REQUEST


def readable_tokens(profile: Profile, group: ClassGroup, tp: int, share: float) -> float:
    """Prompt tokens that an instance reads within that share of the tightest first-token bound of its pool; infinite
    where prompts cost nothing. A prompt is read in proportion to the GPUs, as a rough guess."""
    token_s = profile.work.input_s * max(profile.tps) / tp
    return share * first_token_bound_s(profile, group) / token_s if token_s > 0 else inf


def first_token_bound_s(profile: Profile, group: ClassGroup) -> float:
    """The tightest of a pool's classes."""
    return min(profile.slo.ttft_ms(request_class.input) for request_class in group.classes) / 1e3
