"""How a time is spent: which stage trains how many steps, kept in a file that survives a kill."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from unclip_jax.common.files import write_text
from unclip_jax.errors import UserError
from unclip_jax.train_all.pace import Pace
from unclip_jax.train_all.sizes import SHARES, STAGES

FILE = "train_all.json"
FEWEST_STEPS = 20  # of any stage, however short the time
OVERHEAD = 1.5  # what reading, figures, previews and saving cost, in compilations of the step
PAGE = 1.0  # and what drawing the page costs, in those of the stages that draw


@dataclasses.dataclass
class Entry:
    """What is known of a stage's training.

    Attributes:
        pace: as it was measured.
        steps: to train up to, 0 while that is not settled.
        base: the step from which on.
        seconds: that were given to that.
        done: whether it has trained and its model is there.
    """

    pace: Pace
    steps: int = 0
    base: int = 0
    seconds: float = 0.0
    done: bool = False


@dataclasses.dataclass
class Budget:
    """A time and what has been made of it; `write` after every change.

    Attributes:
        size: of the models.
        data: name of the data set.
        fingerprint: of the data.
        minutes: the whole time.
        spent: seconds that went into what is done, in all lives of the command.
        entries: of the stages in their order.
    """

    size: str
    data: str
    fingerprint: str
    minutes: float
    spent: float
    entries: dict[str, Entry]

    def write(self, out: Path) -> None:
        """Keep it in a folder."""
        write_text(out / FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, out: Path) -> Budget | None:
        """The one kept in a folder; None if there is none.

        Raises:
            UserError: the file is damaged.
        """
        path = out / FILE
        if not path.is_file():
            return None
        try:
            kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            entries = {
                name: Entry(**(kept["entries"][name] | {"pace": Pace(**found["pace"])}))
                for name, found in kept["entries"].items()
            }
            if list(entries) != list(STAGES):
                raise ValueError(f"stages {', '.join(entries)}")
            return cls(**(kept | {"entries": entries}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: damaged ({error}); delete it, and what is trained goes on in a new time"
            ) from error

    def left(self) -> list[str]:
        """The stages that are still to train."""
        return [name for name, entry in self.entries.items() if not entry.done]

    def aside(self) -> float:
        """Seconds that are still needed for all but steps: figures, previews, the page."""
        compiling = {name: entry.pace.compiling for name, entry in self.entries.items()}
        page = PAGE * sum(compiling[name] for name in STAGES if name != "clip")
        return page + OVERHEAD * sum(compiling[name] for name in self.left())

    def training_seconds(self) -> float:
        """What is left for steps, of all stages still to train."""
        return 60 * self.minutes - self.spent - self.aside()

    def settle(self, name: str, trained: int) -> Entry:
        """Decide how many steps a stage trains, of which so many lie behind it."""
        entry, left = self.entries[name], self.left()
        share = SHARES[name] / sum(SHARES[other] for other in left)
        seconds = max(share * self.training_seconds(), FEWEST_STEPS * entry.pace.step)
        entry.base, entry.steps = (
            trained,
            trained + max(FEWEST_STEPS, int(seconds / entry.pace.step)),
        )
        entry.seconds = seconds + OVERHEAD * entry.pace.compiling
        return entry

    def extend(self, minutes: float) -> None:
        """Give it another time. CLIP stays as it is once it is done: the others stand on it."""
        if minutes > self.minutes:
            for name, entry in self.entries.items():
                if name != "clip" or not entry.done:
                    entry.done, entry.steps = False, 0
        self.minutes = minutes
