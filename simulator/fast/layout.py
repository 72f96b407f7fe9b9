"""How a fleet lies in memory: the records that kernels work on and Python reads between two advances.

A field's offset is known when the kernels are compiled, so records cost no more than loose arrays and keep what
belongs to one instance or request side by side. Times are seconds of the fleet's clock, powers and energies per GPU.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Where an instance stands. Rows that hold none are ABSENT. COPYING: empty, its weights on their way to host memory.
ABSENT, LOADING, READY, DRAINING, COPYING, ASLEEP, STOPPING = range(7)

# What its GPUs do, as an index into INSTANCE.energy_j.
SERVING, IDLE, AT_LOADING, AT_DRAINING, AT_ASLEEP = range(5)
ACCOUNTS = 5

# Request classes are numbers: 3 * input bucket + output bucket, each 0 (S) to 2 (L).
CLASSES = 9
BUCKETS = 3

# Bounds of the memory, not of the model.
MOST_RUNNING = 256
MOST_POOLS = 16
# A heap entry is a finishing step and a slot in one number; 39 bits of steps are 17,000 years of decoding at 1 kHz.
SLOT_BITS = 24
SLOT_MASK = (1 << SLOT_BITS) - 1
NONE = -1

# Token gaps: bins of 0.1 ms around their centres up to 1 s, then of 10 ms up to a minute.
FINE_GAPS = 10_000
COARSE_GAPS = 5_900
GAP_BINS = FINE_GAPS + COARSE_GAPS

# Columns of FLEET.counters, by class: arrivals under the class dealt to them, the rest under the true class.
ARRIVED, COMPLETED, FAILED, IN_SLO, INPUT_TOKENS, OUTPUT_TOKENS = range(6)
COUNTERS = 6

# Columns of the cost table, by tokens of an iteration (see tables.py).
BASE_S, BASE_J, TENSOR_W = range(3)
COST_COLUMNS = 4  # padded to half a cache line

RATES = np.dtype(
    [
        ("kv_s", "f8"),  # per token of context
        ("kv_w", "f8"),
        ("sequence_s", "f8"),  # per decoding sequence beside prefill, drawn at kv_w
        ("attention_s", "f8"),  # per unit of prefill attention, drawn at the tensor power
        ("idle_w", "f8"),  # with a context; also of the gaps in which the GPU waits for its host
        ("floor_s", "f8"),  # of an iteration that decodes: 0, or the legacy engine's
    ],
    align=True,
)

# What routing looks at: read for many instances at every request, so it is kept apart and small.
FRONT = np.dtype(
    [
        ("end_s", "f8"),  # of the run in flight; inf while idle
        ("score", "f8"),  # the least is routed to, its load per weight (controller/policy/routing/); inf without room
        ("weight", "f8"),
        ("besides", "f8"),  # load that it is taken to have beside its own
        ("held", "i8"),  # requests routed here that have not finished
        ("pending", "i8"),  # prompt tokens of those without a first token
        ("limit", "i8"),
        ("most_pending", "i8"),  # at which it gets nothing more, by order of the emergency ladder
    ],
    align=True,
)

INSTANCE = np.dtype(
    [
        ("state", "i8"),
        ("account", "i8"),
        ("cost_row", "i8"),  # of its tensor parallelism and clock
        ("tp", "i8"),
        ("capacity", "i8"),  # KV tokens
        # Energy is booked up to at_s; from there power_w is drawn.
        ("at_s", "f8"),
        ("power_w", "f8"),
        # The run in flight: `steps` merged steps, the first of step_s and step_j, each further one grows.
        ("start_s", "f8"),
        ("steps", "i8"),
        ("step_s", "f8"),
        ("step_growth_s", "f8"),
        ("step_j", "f8"),
        ("step_growth_j", "f8"),
        ("batch", "i8"),  # sequences that decode in it
        ("paused", "i8"),  # 1: prefills were taken before the decodes, each of which has its last_token_s
        ("last_chunk", "i8"),  # prefill tokens of the last of `prefill`; those before it are completed by the run
        # The scheduler.
        ("step", "i8"),
        ("decoding", "i8"),
        ("decode_kv", "i8"),
        ("prefilling", "i8"),
        ("prefill_kv", "i8"),
        ("waiting", "i8"),
        ("head", "i8"),
        ("tail", "i8"),
        ("joins", "i8"),
        ("preemptions", "i8"),
        ("energy_j", "f8", (ACCOUNTS,)),
        ("by_class", "i8", (CLASSES,)),  # decoding sequences
        ("prefill", "i4", (MOST_RUNNING,)),  # slots, in order of admission
        ("heap", "i8", (MOST_RUNNING,)),  # decoding: finishing step and slot
    ],
    align=True,
)

# A request between its arrival and its end.
SLOT = np.dtype(
    [
        ("request", "i8"),
        ("arrival_s", "f8"),
        ("first_s", "f8"),
        ("last_token_s", "f8"),  # when it was preempted, or has to wait for prefills: the instant of its last token
        ("joined_step", "i8"),
        ("join", "i8"),  # number of its join: the latest is preempted first
        ("input", "i4"),
        ("output", "i4"),
        ("generated", "i4"),  # exact outside decoding; while decoding, the count when it (re)joined
        ("target", "i4"),  # tokens to compute before the next token
        ("prefilled", "i4"),
        ("next", "i4"),  # in whatever queue it stands
        ("queue_s", "f4"),
        ("instance", "i2"),
        ("pool", "i1"),
        ("request_class", "i1"),
        ("routing_class", "i1"),  # that it waits under
        ("preemptions", "i4"),
    ],
    align=True,
)

# What became of a request: written when it ends. NaN: it was refused, or has not ended.
RESULT = np.dtype(
    [
        ("first_s", "f8"),
        ("finished_s", "f8"),
        ("queue_s", "f4"),
        ("instance", "i2"),
        ("pool", "i1"),
        ("preempted", "u1"),
    ],
    align=True,
)

# A pool's member, in the order of instance ids. `share` and `other` are an alias table over the weights.
MEMBER = np.dtype([("instance", "i4"), ("other", "i4"), ("share", "f8")], align=True)

FLEET = np.dtype(
    [
        ("now_s", "f8"),
        ("start_s", "f8"),  # of the trace
        ("cursor", "i8"),  # next request to arrive
        ("rows", "i8"),  # instances stand in rows below this
        ("free_slot", "i8"),
        ("live", "i8"),  # requests between arrival and end
        ("random", "u8"),
        # Settings
        ("chunk_tokens", "i8"),
        ("prefill_first", "i8"),  # 1: an iteration takes prompts alone while there are any
        ("max_running", "i8"),
        ("choices", "i8"),  # instances drawn for a request; 0: all are looked at
        ("max_waiting", "i8"),
        ("prompt_tokens", "f8"),  # without a first token yet, that weigh as one request
        ("quantile", "f8"),
        ("remembered", "f8"),
        ("accuracy", "f8"),  # of a predictor of the output bucket; negative: none, routing goes by experience
        ("predictor", "u8"),  # its seed
        ("input_cuts", "i8", (2,)),
        ("output_cuts", "i8", (2,)),
        ("ttft_s", "f8", (BUCKETS,)),
        ("ttft_ms", "f8", (BUCKETS,)),
        ("tbt_ms", "f8"),
        # Routing
        ("pools", "i8"),
        ("members", "i8", (MOST_POOLS,)),
        ("preferred", "i8", (CLASSES,)),  # how many pools may serve the class
        ("preference", "i8", (CLASSES, MOST_POOLS)),
        ("in_flight", "i8", (MOST_POOLS,)),
        # The queue of requests that no instance has room for, by routing class; behind them, in the same order, those
        # that will not meet their deadline, while their pool is ordered to put them behind.
        ("queued", "i8"),
        ("queue", "i8", (2 * CLASSES,)),
        ("queue_head", "i8", (2 * CLASSES,)),
        ("queue_tail", "i8", (2 * CLASSES,)),
        # Orders of the emergency ladder, by routing class (controller/policy/emergency.py).
        ("ordered", "i8"),  # 1 while any stands
        ("rerouted", "i8"),  # 1 until the queue has been looked at under a new table
        ("reorders", "i8", (CLASSES,)),
        ("refuses", "i8", (CLASSES,)),
        ("first_token_s", "f8", (CLASSES,)),  # to expect once an instance has the request
        ("open_to", "i8", (CLASSES,)),  # pools that it competes for as one of their own, as bits
        # The classifier's experience, by input and output bucket.
        ("seen", "f8", (BUCKETS, BUCKETS)),
        ("owed", "f8", (BUCKETS, BUCKETS)),
        # Cumulative
        ("counters", "i8", (CLASSES, COUNTERS)),
        ("spilled", "i8"),
        ("mispredicted", "i8"),  # routed for another output bucket than the true one
        ("outgrown", "i8"),  # of these, for a shorter one
        ("refused", "i8"),
        ("refused_by", "i8", (MOST_POOLS, 2)),  # by own pool: queue full, too late
        ("last_end_s", "f8"),
        ("running_s", "f8", (MOST_RUNNING + 1,)),  # instance-seconds by requests in the batch
    ],
    align=True,
)


def gap_centres_s() -> NDArray[np.float64]:
    """The token gap that each bin stands for."""
    fine = np.arange(FINE_GAPS) / 1e4
    coarse = FINE_GAPS / 1e4 + (np.arange(COARSE_GAPS) + 0.5) / 100
    return np.concatenate((fine, coarse))
