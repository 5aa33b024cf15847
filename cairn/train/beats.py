"""What ranks tell each other, and what rank 0 makes of it: who is silent, who is lost, who is behind in a hang.

Times are not read from clocks here: each look at the beats is told how long ago the last one was, and counts no more
than a few intervals of it. A job that was suspended as a whole thus finds nobody late when it wakes.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PHASES = ("start", "data", "step", "log", "evaluate", "save", "end")
"""What a rank does, in the order in which it does it after a given step."""
QUIET = b"."
"""First byte of a beat that rank 0 need not read."""
SHOWN = 16
"""Silent ranks that a verdict names; when more are silent at once, a switch or a file system is to blame."""


@dataclass(frozen=True)
class Beat:
    """A sign of life."""

    rank: int
    host: str
    pid: int
    count: int = 0
    """Beats so far."""
    phase: str = "start"
    step: int = 0
    marks: int = 0
    """Calls of `phase` so far."""
    seconds: float = 0.0
    """In this phase."""
    hangs: bool = False
    """Its phase has lasted too long."""
    where: str = ""
    """FILE:LINE FUNCTION of its main thread, once its stacks are written."""
    waits: bool = False
    """Its main thread waits for other ranks."""
    runs: tuple[int, ...] = ()
    """Silent ranks whose process runs on this host."""
    left: int | None = None
    """The exit code, once it leaves; 0 for a normal end."""
    why: str = ""
    """The error it leaves with, where that is a line for the user."""

    @property
    def name(self) -> str:
        """The rank as messages name it."""
        return f"rank {self.rank} ({self.host}, pid {self.pid})"

    @property
    def place(self) -> str:
        """What it does, in words."""
        at = {"start": "at the start", "end": "at the end"}.get(self.phase)
        return at or {"evaluate": "in the evaluation at ", "save": "in the save at "}.get(self.phase, "in ") + (
            f"step {self.step}"
        )

    def encode(self) -> str:
        """For the store."""
        news = self.hangs or self.where or self.runs or self.left is not None
        return ("!" if news else QUIET.decode()) + json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> "Beat":
        """From the store."""
        return _beat(json.loads(text[1:]))


@dataclass(frozen=True)
class Silent:
    """A rank that is not heard of, or left with an error."""

    beat: Beat
    seconds: float
    """Since its last beat."""
    seen_by: int | None = None
    """The rank of its host that sees its process run."""

    @property
    def runs(self) -> bool:
        """Whether its process is known to run."""
        return self.seen_by is not None

    def lost(self, seconds: float) -> str:
        """The message."""
        return f"{self.beat.name} was lost: no sign of life for {max(1.0, seconds):.0f} s, last {self.beat.place}"


@dataclass(frozen=True)
class Verdict:
    """What rank 0 tells all ranks after each look."""

    main: Beat
    """Rank 0's own last beat."""
    count: int = 0
    missing: tuple[Silent, ...] = ()
    dump: bool = False
    """Write your stacks."""
    stop: str = ""
    """End now, with this message."""
    code: int = os.EX_TEMPFAIL
    """Exit code of this end."""

    def encode(self) -> str:
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: bytes) -> "Verdict":
        """From the store."""
        fields = json.loads(text)
        missing = tuple(Silent(**(m | {"beat": _beat(m["beat"])})) for m in fields["missing"])
        return cls(**(fields | {"main": _beat(fields["main"]), "missing": missing}))


@dataclass
class Judge:
    """Rank 0's view of all ranks."""

    world_size: int
    interval: float
    """Seconds between two beats."""
    lost: float
    """Seconds of silence after which a rank is lost."""
    hang: float
    """Seconds in a phase after which it hangs; 0: never."""
    folder: Path
    """Where stacks go, for the message."""
    present: int = field(init=False)
    """Ranks that have not left."""
    heard: int = field(init=False)
    """Those of them, beside rank 0, that are not silent."""

    def __post_init__(self) -> None:
        self.present = self.heard = self.world_size
        self._count = 0
        self._beats: Sequence[bytes] = [b""] * self.world_size
        self._silence = [0.0] * self.world_size
        self._dumping: float | None = None
        """Seconds since the ranks were told to write their stacks."""
        self._end: tuple[str, int] | None = None

    def look(self, beats: Sequence[bytes], seconds: float) -> Verdict:
        """Judge the newest beats, by rank, `seconds` after the last look. A verdict to stop is final."""
        self._count += 1
        passed = min(seconds, 3 * self.interval)
        self._silence = [
            0.0 if new != old else silence + passed
            for new, old, silence in zip(beats, self._beats, self._silence, strict=True)
        ]
        self._beats = beats
        silent = {rank for rank, silence in enumerate(self._silence) if silence > 2.5 * self.interval}
        news = [Beat.decode(beat) for beat in beats if beat[:1] != QUIET]
        seen = {other: beat.rank for beat in news if beat.rank not in silent for other in beat.runs}
        left = {beat.rank for beat in news if beat.left is not None}
        self.present = self.world_size - len(left)
        self.heard = self.world_size - len(left | silent | {0})
        missing = [
            Silent(Beat.decode(beats[rank]), self._silence[rank], seen.get(rank)) for rank in sorted(silent - left)
        ]
        failed = [Silent(beat, self._silence[beat.rank]) for beat in news if beat.left]
        absent = silent | left
        if self._end is None:
            self._end = self._lost(missing, failed) or self._hung(missing, news, absent, passed)
        stop, code = self._end or ("", os.EX_TEMPFAIL)
        shown = (*missing, *failed)[:SHOWN]
        return Verdict(Beat.decode(beats[0]), self._count, shown, self._dumping is not None, stop, code)

    def _lost(self, missing: list[Silent], failed: list[Silent]) -> tuple[str, int] | None:
        """Message and exit code, where a rank is lost, or the others outstay one that left with an error."""
        if lost := [m for m in missing if m.seconds > self.lost and not m.runs]:
            return max(lost, key=lambda m: m.seconds).lost(self.lost), os.EX_TEMPFAIL
        if late := [m for m in failed if m.seconds > self.lost]:
            return ended(max(late, key=lambda m: m.seconds).beat)
        return None

    def _hung(self, missing: list[Silent], news: list[Beat], absent: set[int], passed: float) -> tuple[str, int] | None:
        """The same, where a rank hangs: first all write their stacks, then the one that is behind is named."""
        frozen = {m.beat.rank: m.beat.seconds + m.seconds for m in missing if m.runs}
        hangs = any(beat.hangs for beat in news if beat.left is None)
        if self._dumping is None and not hangs and not any(seconds > self.hang > 0 for seconds in frozen.values()):
            return None
        self._dumping = 0.0 if self._dumping is None else self._dumping + passed
        there = set(range(self.world_size)) - absent
        if there - {beat.rank for beat in news if beat.where} and self._dumping < 10 * self.interval:
            return None
        here = [Beat.decode(self._beats[rank]) for rank in there | frozen.keys()]
        behind = min(here, key=lambda beat: (beat.step, _order(beat.phase), beat.marks, beat.waits, beat.rank))
        return hung(behind, frozen.get(behind.rank, behind.seconds), self.folder), os.EX_TEMPFAIL


def _order(phase: str) -> int:
    return PHASES.index(phase) if phase in PHASES else 0


def _beat(fields: dict[str, Any]) -> Beat:
    return Beat(**(fields | {"runs": tuple(fields["runs"])}))


def hung(beat: Beat, seconds: float, folder: Path) -> str:
    """The message on a rank that hangs."""
    time = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
    where = f"in {beat.where}" if beat.where else "in a call that lets no Python thread run"
    return f"{beat.name} hangs: {time} {beat.place}, {where}; stacks of all ranks: {folder}"


def ended(beat: Beat) -> tuple[str, int]:
    """Message and exit code for the ranks that a rank left behind with its error."""
    if beat.left == os.EX_TEMPFAIL and beat.why:
        return beat.why, os.EX_TEMPFAIL
    final = beat.left in (2, 130)
    return f"{beat.name} ended with an error {beat.place}: {beat.why or 'its own output says which'}", (
        beat.left if final and beat.left else os.EX_TEMPFAIL
    )
