"""The last routing table on disk, so that a gateway that starts while its controller is down still knows its instances.

Written through a temporary file and a rename: a crash leaves the old table or the new one. A table that cannot be read
is no table; the controller's next one replaces it in any case. Orders of the emergency ladder are not kept: they are
for seconds, and nobody knows how old a file's are.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from google.protobuf.message import DecodeError

from common.logs import get_logger
from controller.api.wire import routing_from_wire, routing_to_wire
from controller.fleet.port import RoutingTable
from dynamollm.v1 import controller_pb2 as pb

_log = get_logger(__name__)
NAME = "routing.pb"


class Snapshot:
    """`folder` None: nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / NAME
        self._saved: RoutingTable | None = None

    def load(self) -> RoutingTable | None:
        if self._path is None or not self._path.exists():
            return None
        try:
            return routing_from_wire(pb.WatchRoutingResponse.FromString(self._path.read_bytes()))
        except (OSError, ValueError, DecodeError) as error:
            _log.warning("snapshot_not_read", path=str(self._path), reason=str(error))
            return None

    def save(self, table: RoutingTable) -> None:
        """A disk that cannot be written to costs the snapshot, not the requests."""
        table = replace(table, pools=tuple(replace(pool, order=None) for pool in table.pools))
        if self._path is None or table == self._saved:
            return
        fresh = self._path.with_suffix(".new")
        try:
            fresh.write_bytes(routing_to_wire(table).SerializeToString())
            fresh.replace(self._path)
            self._saved = table
        except OSError as error:
            _log.warning("snapshot_not_written", path=str(self._path), reason=str(error))
