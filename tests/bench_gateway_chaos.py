"""`scripts/bench gateway-chaos`: ten minutes of drains, kills and re-shards, both ways in (tests/chaos.py)."""

from tests.bench_gateway import measure_chaos as measure

__all__ = ["measure"]
