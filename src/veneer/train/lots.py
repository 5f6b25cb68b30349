"""Statistics as large as the model, a lot of layers at a time: gathered when a start asks for them, then forgotten."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from veneer.inits import InitStats

LOT_BYTES = 512 * 2**20
"""Memory for gradients or covariances that are gathered at a time."""

Progress = Callable[[float], None]


class ByLot(Mapping[str, InitStats]):
    """Statistics that are gathered when the first of their lot is asked for; one lot is held at a time."""

    def __init__(
        self, lots: Sequence[Sequence[str]], gather: Callable[[Sequence[str], Progress], dict[str, InitStats]],
        progress: Progress,
    ) -> None:  # fmt: skip
        self._lots = lots
        self._lot_of = {target: number for number, lot in enumerate(lots) for target in lot}
        self._gather, self._progress = gather, progress
        self._number = -1
        self._held: dict[str, InitStats] = {}

    def __getitem__(self, target: str) -> InitStats:
        number = self._lot_of[target]
        if number != self._number:
            self._held = {}  # before the next one is gathered
            self._held = self._gather(
                self._lots[number], lambda share: self._progress((number + share) / len(self._lots))
            )
            self._number = number
        return self._held[target]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lot_of)

    def __len__(self) -> int:
        return len(self._lot_of)


def lots(targets: Iterable[str], weighs: Callable[[str], int]) -> list[list[str]]:
    """Targets, in order, in lots whose bytes fit into the budget; a target that doesn't has a lot of its own."""
    found: list[list[str]] = [[]]
    used = 0
    for target in targets:
        size = weighs(target)
        if found[-1] and used + size > LOT_BYTES:
            found.append([])
            used = 0
        found[-1].append(target)
        used += size
    return found
