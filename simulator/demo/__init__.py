"""The demonstration: a whole fleet of real processes over emulated GPUs on one machine, measured and compared."""
