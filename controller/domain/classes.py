"""Request classes: input bucket x output bucket (SS, SM, ... LL; input first).

A class dominates another when neither of its buckets is smaller: a pool that serves LL may serve anything,
one that serves SL may not serve MS. Cut points are configurable; the defaults are DynamoLLM's.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from itertools import product
from typing import NamedTuple


class Bucket(StrEnum):
    """Short, medium or long; compares by size."""

    S = "S"
    M = "M"
    L = "L"

    @property
    def rank(self) -> int:
        return _RANKS[self]


_RANKS = {bucket: rank for rank, bucket in enumerate(Bucket)}


class RequestClass(NamedTuple):
    """One of the nine classes; `str()` gives its two letters. It is the key of nearly every count of load: a tuple's
    hash costs a tenth of a dataclass's."""

    input: Bucket
    output: Bucket

    def __str__(self) -> str:
        return f"{self.input.value}{self.output.value}"

    @classmethod
    def parse(cls, name: str) -> RequestClass:
        """From two letters such as "SM"; raises ValueError for anything else."""
        if len(name) != 2:
            raise ValueError(f"{name!r} is no request class: two letters of S, M, L are needed")
        return cls(Bucket(name[0]), Bucket(name[1]))

    def dominates(self, other: RequestClass) -> bool:
        return self.input.rank >= other.input.rank and self.output.rank >= other.output.rank


ALL_CLASSES: tuple[RequestClass, ...] = tuple(RequestClass(i, o) for i, o in product(Bucket, Bucket))


@dataclass(frozen=True, slots=True)
class ClassScheme:
    """Cut points in tokens: S < first <= M < second <= L."""

    input_cuts_tokens: tuple[int, int] = (256, 1024)
    output_cuts_tokens: tuple[int, int] = (100, 350)

    def input_bucket(self, tokens: int) -> Bucket:
        return _bucket(tokens, self.input_cuts_tokens)

    def output_bucket(self, tokens: int) -> Bucket:
        return _bucket(tokens, self.output_cuts_tokens)

    def classify(self, input_tokens: int, output_tokens: int) -> RequestClass:
        return RequestClass(self.input_bucket(input_tokens), self.output_bucket(output_tokens))


def _bucket(tokens: int, cuts: tuple[int, int]) -> Bucket:
    if tokens < cuts[0]:
        return Bucket.S
    return Bucket.M if tokens < cuts[1] else Bucket.L


@dataclass(frozen=True, slots=True)
class ClassGroup:
    """The classes that one pool serves; its name is the pool's name."""

    name: str
    classes: frozenset[RequestClass]

    def dominates(self, other: RequestClass) -> bool:
        """True when some class of the group dominates `other`, so that the pool may serve it."""
        return any(member.dominates(other) for member in self.classes)


def by_input(name: str, buckets: str) -> ClassGroup:
    """The group of all classes whose input bucket is one of `buckets`, e.g. by_input("short", "SM")."""
    return ClassGroup(name, frozenset(c for c in ALL_CLASSES if c.input.value in buckets))


# The groups that profiles measure and the planner may use as pools. Splitting by input length separates short
# prompts from the head-of-line blocking of long prefills; splitting by output length gave almost nothing on the
# public traces, so no such group is measured by default.
DEFAULT_GROUPS: tuple[ClassGroup, ...] = (by_input("all", "SML"), by_input("short", "SM"), by_input("long", "L"))

# The ways to cut the classes into pools, each a set of group names that covers every class once.
DEFAULT_PARTITIONS: tuple[tuple[str, ...], ...] = (("all",), ("short", "long"))
