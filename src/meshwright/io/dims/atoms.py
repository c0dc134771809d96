"""Atoms: what dims are made of before they have names.

A rule says that two dims are one; a view, that a dim is a product of others. Both are heard in any order, so the atoms
are kept as a forest (union-find) in which one that was split stands for its factors wherever it was used.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class Atoms:
    """Dims that are joined with each other and split into factors (union-find)."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.links: list[int | tuple[int, int] | None] = []
        self.whole: set[int] = set()

    def new(self, size: int) -> int:
        """A new atom."""
        self.sizes.append(size)
        self.links.append(None)
        return len(self.sizes) - 1

    def leaves(self, atoms: Iterable[int]) -> list[int]:
        """What the atoms have become, outermost factor first."""
        found: list[int] = []
        stack = list(atoms)[::-1]
        while stack:
            atom = stack.pop()
            link = self.links[atom]
            while isinstance(link, int):
                following = self.links[link]
                if isinstance(following, int):
                    self.links[atom] = following
                atom, link = link, following
            if link is None:
                found.append(atom)
            else:
                stack += link[::-1]
        return found

    def join(self, ours: Sequence[int], theirs: Sequence[int]) -> bool:
        """Say that two products of atoms are one dim; whether their factors fit into each other."""
        left, right = self.leaves(ours)[::-1], self.leaves(theirs)[::-1]
        while left and right:
            one, *more = self.leaves([left.pop()])
            two, *others = self.leaves([right.pop()])
            left += more[::-1]
            right += others[::-1]
            if one == two:
                continue
            if self.sizes[one] == self.sizes[two]:
                self.links[two] = one
                if two in self.whole:
                    self.whole.add(one)
                continue
            if self.sizes[one] < self.sizes[two]:
                one, two, left, right = two, one, right, left
            if self.sizes[one] % self.sizes[two] or one in self.whole:
                return False
            rest = self.new(self.sizes[one] // self.sizes[two])
            self.links[one] = (two, rest)
            left.append(rest)
        return not left and not right
