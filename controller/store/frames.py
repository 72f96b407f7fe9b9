"""Input frames as they are stored: the journal's lines (controller/loop/journal.py), with numbers in columns.

Two kinds of line make nearly all of a frame: what nodes have shown (`b`) and what gateways report (`l`). Of these only
a stub stays in the text (`B`, `L`); their numbers go, as differences from the ones before, into one column for each
meaning: that takes two fifths of the bytes that text takes. Only numbers on the grid that the controller rounds them to
have a place there; a line with any other stays text, so nothing is ever lost.

Packing is done by the thread that writes history, not by the loop. A frame knows nothing of the one before it.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

_FORMAT = "2:"  # a colon is in no base64: without it a frame is of the first format, plain text
_LARGEST = 2.0**53  # whole numbers below it are exact as floats
_SCALE = np.array([1.0, 1.0, 100.0])  # running, waiting, KV use: what one of each is counted in
_COUNTERS, _QUEUE = 6, 3  # numbers of a class, and of a queue without trouble, as the journal writes them
_COMPLETED, _IN_SLO = 1, 3  # nearly equal: the second is kept as what it lacks of the first


class _Plain(Exception):
    """A line that the columns have no place for."""


def pack_frame(lines: Sequence[str]) -> str:
    """The frame as text for a column of the database."""
    batches, loads = _Batches(), _Loads()
    text = []
    for line in lines:
        try:
            if line.startswith('["b",'):
                text.append(_json(batches.put(line)))
            elif line.startswith('["l",'):
                text.append(_json(loads.put(json.loads(line))))
            else:
                text.append(line)
        except (_Plain, ValueError, TypeError, LookupError, OverflowError):
            text.append(line)
    columns = [_planes(column) for column in (*batches.columns(), *loads.columns())]
    head = [loads.head(), [[len(each), each[0].size if each else 0] for each in columns]]
    packed = zlib.compress("\n".join((_json(head), *text)).encode(), 6)
    numbers = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_FILTERED)
    pieces = [len(packed).to_bytes(4, "big"), packed]
    for plane in chain.from_iterable(columns):
        pieces += [numbers.compress(plane.tobytes()), numbers.flush(zlib.Z_FULL_FLUSH)]  # each has codes of its own
    return _FORMAT + base64.b85encode(b"".join((*pieces, numbers.flush()))).decode()


def frame_lines(body: str) -> tuple[str, ...]:
    """The lines again, of any format. Raises ValueError for what was never packed."""
    try:
        if not body.startswith(_FORMAT):
            return tuple(zlib.decompress(base64.b64decode(body, validate=True)).decode().split("\n"))
        data = base64.b85decode(body.removeprefix(_FORMAT))
        ends = 4 + int.from_bytes(data[:4], "big")
        first, *text = zlib.decompress(data[4:ends]).decode().split("\n")
        head, sizes = json.loads(first)
        columns = _from_planes(zlib.decompress(data[ends:]), sizes)
        batches, loads = _Batches(columns), _Loads(columns, head)
        return tuple(_line(line, batches, loads) for line in text)
    except (ValueError, TypeError, LookupError, StopIteration, zlib.error) as error:
        raise ValueError(f"a packed frame is damaged: {error!r}") from None


def _line(line: str, batches: _Batches, loads: _Loads) -> str:
    if line.startswith('["B",'):
        return _json(batches.get(json.loads(line)))
    if line.startswith('["L",'):
        return _json(loads.get(json.loads(line)))
    return line


# -------------------------------------------------------------------------------------------------- columns


class _Columns:
    """Columns that are read from the front, piece by piece."""

    def __init__(self, columns: Iterable[Ints]) -> None:
        self._columns = list(columns)
        self._at = [0] * len(self._columns)

    def take(self, column: int, count: int) -> Ints:
        begins = self._at[column]
        self._at[column] = begins + count
        taken = self._columns[column][begins : begins + count]
        if taken.size != count:
            raise ValueError("a column ends early")
        return taken


def _planes(column: Sequence[Ints]) -> list[NDArray[np.uint8]]:
    """The bytes of a column's numbers: all lowest ones, all second lowest ones, up to the largest number's highest."""
    numbers = np.concatenate(column) if column else np.empty(0, np.int64)
    if not numbers.size:
        return []
    unsigned = ((numbers << 1) ^ (numbers >> 63)).astype("<u8")  # small whatever the sign
    used = (int(unsigned.max()).bit_length() + 7) // 8
    return list(unsigned.view(np.uint8).reshape(-1, 8)[:, : max(1, used)].T)


def _from_planes(data: bytes, sizes: Sequence[Sequence[int]]) -> _Columns:
    columns, at = [], 0
    for planes, count in sizes:
        numbers = np.zeros(count, np.uint64)
        for plane in range(planes):
            numbers |= np.frombuffer(data, np.uint8, count, at).astype(np.uint64) << np.uint64(8 * plane)
            at += count
        columns.append((numbers >> np.uint64(1)).astype(np.int64) ^ -(numbers & np.uint64(1)).astype(np.int64))
    return _Columns(columns)


def _whole(value: Any, scale: float) -> int:
    """A float in units of 1/scale, where these give the very number back."""
    if type(value) is not float or not 0.0 < value < _LARGEST / scale:
        if type(value) is float and str(value) == "0.0":
            return 0
        raise _Plain
    counted = round(value * scale)
    if counted / scale != value:
        raise _Plain
    return counted


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True)


# ---------------------------------------------------------------------------------------- what nodes have shown

_PRESENT, _AGES, _LENGTHS, _UNKNOWN, _READINGS = 0, 1, 2, 3, 4
_BATCH_COLUMNS = _READINGS + len(_SCALE)
_ABSENT, _SEEN, _CHANGED = 0, 1, 2
_NONE = -1  # a reading that is not known


class _Batches:
    """Lines `["b", base_s, ages, {node: [[running, waiting, kv], ...]}]`. Its fields are what both sides know of the
    lines before: each node's last age, its number of instances and their readings."""

    def __init__(self, columns: _Columns | None = None) -> None:
        self._read = columns
        self._written: list[list[Ints]] = [[] for _ in range(_BATCH_COLUMNS)]
        self._ages = np.zeros(0, np.int64)
        self._lengths = np.zeros(0, np.int64)
        self._starts = np.zeros(0, np.int64)
        self._readings = np.zeros((0, len(_SCALE)), np.int64)
        self._counted: list[dict[str, int]] = [{"null": _NONE} for _ in _SCALE]  # how readings are written: few ways

    def columns(self) -> list[list[Ints]]:
        return self._written

    def put(self, line: str) -> list[Any]:
        """The line's stub."""
        ends = line.index("],{") + 1
        _, base_s, ages = json.loads(line[:ends] + "]")
        known = [age for age in ages if age is not None]
        if set(map(type, known)) - {int}:
            raise _Plain
        nodes, lengths, readings = self._changed(line[ends + 1 : -1])
        unknown = readings == _NONE
        present = np.array([_ABSENT if age is None else _SEEN for age in ages], np.int64)
        if np.any(present[nodes] == _ABSENT):
            raise _Plain
        least = min(known, default=0)
        given = np.array(known, np.int64) - least
        unit = 100 if not np.any(given % 100) else 1  # samples are a tenth of a second apart, ticks are not

        self._fit(len(ages), nodes, lengths)
        seen = np.flatnonzero(present)
        given //= unit
        present[nodes] = _CHANGED
        where = self._where(nodes)
        before = self._readings[where]
        readings[unknown] = before[unknown]
        for column, numbers in (
            (_PRESENT, present),
            (_AGES, given - self._ages[seen]),
            (_LENGTHS, lengths),
            (_UNKNOWN, unknown @ np.array([1, 2, 4])),
            *((_READINGS + n, readings[:, n] - before[:, n]) for n in range(len(_SCALE))),
        ):
            self._written[column].append(numbers)
        self._ages[seen] = given
        self._readings[where] = readings
        return ["B", base_s, len(ages), least, unit]

    def _changed(self, text: str) -> tuple[Ints, Ints, Ints]:
        """Of the changed nodes, in their order: numbers, numbers of instances, and readings in whole units. Cut out of
        the text: as JSON it would be thousands of lists a line, for which the collector would hold up the loop."""
        if text == "{}":
            return np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, len(_SCALE)), np.int64)
        shown: dict[int, str] = {}
        for entry in text.removeprefix('{"').removesuffix("]]}").split(']],"'):
            node, _, readings = entry.partition('":[[')
            shown[int(node)] = readings
        nodes = sorted(shown)
        lengths = [shown[node].count("],[") + 1 for node in nodes]
        instances = "],[".join([shown[node] for node in nodes]).split("],[")
        if {each.count(",") + 1 for each in instances} != {len(_SCALE)}:
            raise _Plain
        numbers = ",".join(instances).split(",")
        columns = []
        for n, (scale, counted) in enumerate(zip(_SCALE.tolist(), self._counted, strict=True)):
            column = numbers[n :: len(_SCALE)]
            for number in set(column) - counted.keys():
                counted[number] = _whole(json.loads(number), scale)
            columns.append([counted[number] for number in column])
        return np.array(nodes, np.int64), np.array(lengths, np.int64), np.array(columns, np.int64).T.copy()

    def get(self, stub: list[Any]) -> list[Any]:
        """The line of a stub."""
        assert self._read is not None
        _, base_s, count, least, unit = stub
        present = self._read.take(_PRESENT, count)
        seen, nodes = np.flatnonzero(present), np.flatnonzero(present == _CHANGED)
        lengths = self._read.take(_LENGTHS, nodes.size)
        self._fit(count, nodes, lengths)
        self._ages[seen] += self._read.take(_AGES, seen.size)
        ages: list[int | None] = [None] * count
        for node, age in zip(seen.tolist(), (self._ages[seen] * unit + least).tolist(), strict=True):
            ages[node] = age
        where = self._where(nodes)
        unknown = self._read.take(_UNKNOWN, where.size)
        for n in range(len(_SCALE)):
            self._readings[where, n] += self._read.take(_READINGS + n, where.size)
        shown = (self._readings[where] / _SCALE).tolist()
        for slot in np.flatnonzero(unknown).tolist():
            shown[slot] = [None if int(unknown[slot]) >> n & 1 else value for n, value in enumerate(shown[slot])]
        live, at = {}, 0
        for node, length in zip(nodes.tolist(), lengths.tolist(), strict=True):
            live[str(node)] = shown[at : at + length]
            at += length
        return ["b", base_s, ages, live]

    def _fit(self, count: int, nodes: Ints, lengths: Ints) -> None:
        """Makes room for nodes that are new or have another number of instances; these begin at zero."""
        if count <= self._lengths.size and np.array_equal(self._lengths[nodes], lengths):
            return
        before_lengths, before_readings = self._lengths, self._readings
        grown = max(count, before_lengths.size) - before_lengths.size
        self._ages = np.concatenate((self._ages, np.zeros(grown, np.int64)))
        self._lengths = np.concatenate((before_lengths, np.zeros(grown, np.int64)))
        self._lengths[nodes] = lengths
        kept = np.flatnonzero(self._lengths[: before_lengths.size] == before_lengths)
        from_where = self._where(kept)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._readings = np.zeros((int(self._lengths.sum()), len(_SCALE)), np.int64)
        self._readings[self._where(kept)] = before_readings[from_where]

    def _where(self, nodes: Ints) -> Ints:
        """The rows of these nodes' instances."""
        lengths = self._lengths[nodes]
        begins = np.cumsum(lengths) - lengths
        return np.repeat(self._starts[nodes] - begins, lengths) + np.arange(int(lengths.sum()))


# ------------------------------------------------------------------------------------- what gateways report

_TIMES = 3


class _Gateway:
    """One gateway's reports: the classes and pools that they tell of, in this order, and a row for each report."""

    def __init__(self, classes: list[str], pools: list[str]) -> None:
        self.classes = classes
        self.pools = pools
        self.times: list[tuple[int, int, int]] = []
        self.counts: list[dict[str, list[int]]] = []
        self.queues: list[list[list[int]]] = []


class _Loads:
    """Lines `["l", monotonic_s, wall_s, [gateway, epoch, observed_s, model, 0, counts, queues]]`: a report that differs
    from an earlier one of the same gateway by counts. `queues` stay in the stub where a queue is in trouble."""

    def __init__(self, columns: _Columns | None = None, head: Iterable[Any] = ()) -> None:
        self._gateways: dict[tuple[str, str, str], _Gateway] = {}
        for *key, classes, pools, reports, queues in head:
            gateway_id, epoch, model = key
            self._gateways[gateway_id, epoch, model] = gateway = _Gateway(classes, pools)
            assert columns is not None
            _read_rows(gateway, columns, reports, queues)
        self._rows: list[tuple[tuple[str, str, str], Iterator[Any], Iterator[Any]]] = [
            (key, zip(each.times, each.counts, strict=True), iter(each.queues)) for key, each in self._gateways.items()
        ]

    def head(self) -> list[Any]:
        return [
            [*key, each.classes, each.pools, len(each.times), len(each.queues)] for key, each in self._gateways.items()
        ]

    def columns(self) -> list[list[Ints]]:
        written: list[list[Ints]] = [[] for _ in range(_TIMES + _COUNTERS + _QUEUE)]
        for gateway in self._gateways.values():
            for column, numbers in enumerate(_rows(gateway)):
                written[column].append(numbers)
        return written

    def put(self, line: list[Any]) -> list[Any]:
        """The line's stub."""
        _, now_s, wall_s, (gateway_id, epoch, observed_s, model, whole, counts, queues) = line
        if whole or set(map(type, (gateway_id, epoch, model))) != {str}:
            raise _Plain
        times = (_whole(now_s, 1e6), _whole(wall_s, 1e6), _whole(observed_s, 1e3))
        for each in counts.values():
            if len(each) != _COUNTERS or not any(each) or set(map(type, each)) != {int} or max(map(abs, each)) > 2**52:
                raise _Plain
        key = gateway_id, epoch, model
        gateway = self._gateways.get(key) or _Gateway([], [])
        classes = [*gateway.classes, *(name for name in counts if name not in gateway.classes)]
        places = [classes.index(name) for name in counts]
        if places != sorted(places):
            raise _Plain
        numbers = _calm(queues)
        if numbers is not None:
            pools = [queue[0] for queue in queues]
            gateway.pools = gateway.pools or pools
            numbers = numbers if gateway.pools == pools else None

        self._gateways[key] = gateway
        gateway.classes = classes
        gateway.times.append(times)
        gateway.counts.append(counts)
        stub = ["L", list(self._gateways).index(key)]
        if numbers is None:
            return [*stub, queues]
        gateway.queues.append(numbers)
        return stub

    def get(self, stub: list[Any]) -> list[Any]:
        """The line of a stub."""
        key, reports, calm = self._rows[stub[1]]
        (now_us, wall_us, observed_ms), counts = next(reports)
        gateway_id, epoch, model = key
        if len(stub) > 2:
            queues = stub[2]
        else:
            pools = self._gateways[key].pools
            queues = [[pool, n, held, ms / 1e3] for pool, (n, held, ms) in zip(pools, next(calm), strict=True)]
        return ["l", now_us / 1e6, wall_us / 1e6, [gateway_id, epoch, observed_ms / 1e3, model, 0, counts, queues]]


def _calm(queues: Any) -> list[list[int]] | None:
    """The numbers of queues without trouble; None for any other."""
    if not queues or any(len(queue) != 1 + _QUEUE for queue in queues):
        return None
    try:
        numbers = [[waiting, in_flight, _whole(oldest_s, 1e3)] for _, waiting, in_flight, oldest_s in queues]
    except _Plain:
        return None
    plain = all(type(number) is int and abs(number) < 2**52 for each in numbers for number in each)
    return numbers if plain else None


def _rows(gateway: _Gateway) -> Iterator[Ints]:
    """The columns of one gateway's reports."""
    times = np.array(gateway.times, np.int64).reshape(-1, _TIMES)
    times[:, 2] -= times[:, 0] // 1000
    times[:, 1] -= times[:, 0]
    yield from np.diff(times, axis=0, prepend=0).T
    nothing = [0] * _COUNTERS
    counts = np.array(
        [[each.get(name, nothing) for name in gateway.classes] for each in gateway.counts], np.int64
    ).reshape(-1, _COUNTERS)
    counts[:, _IN_SLO] -= counts[:, _COMPLETED]
    yield from counts.T
    queues = np.array(gateway.queues, np.int64).reshape(len(gateway.queues), _QUEUE * len(gateway.pools))
    yield from np.diff(queues, axis=0, prepend=0).reshape(-1, _QUEUE).T


def _read_rows(gateway: _Gateway, columns: _Columns, reports: int, calm: int) -> None:
    """What `_rows` wrote, after the columns of batches."""

    def take(first: int, width: int, count: int) -> Ints:
        return np.stack([columns.take(_BATCH_COLUMNS + first + n, count) for n in range(width)], axis=1)

    times = np.cumsum(take(0, _TIMES, reports), axis=0)
    times[:, 1] += times[:, 0]
    times[:, 2] += times[:, 0] // 1000
    gateway.times = [(now, wall, observed) for now, wall, observed in times.tolist()]
    width = len(gateway.classes)
    counts = take(_TIMES, _COUNTERS, reports * width)
    counts[:, _IN_SLO] += counts[:, _COMPLETED]
    for row in counts.reshape(reports, width, _COUNTERS).tolist():
        gateway.counts.append({name: each for name, each in zip(gateway.classes, row, strict=True) if any(each)})
    queues = take(_TIMES + _COUNTERS, _QUEUE, calm * len(gateway.pools))
    gateway.queues = np.cumsum(queues.reshape(calm, len(gateway.pools), _QUEUE), axis=0).tolist()
