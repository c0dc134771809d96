"""The one palette for what a device does, in figures and in the terminal.

The figures' colours are those of Okabe and Ito ("Color Universal Design", 2008), told apart by all eyes: blue is a
whole backward, sky blue the half of it that others wait for. A terminal has but sixteen colours, and its user's theme,
so there they are named.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.sim.program import Kind


@dataclass(frozen=True)
class Colour:
    """`fill` of a bar and `ink` of the words on it, for figures; `terminal` is Rich's name."""

    fill: str
    ink: str
    terminal: str


KIND_COLOURS = {
    Kind.FORWARD: Colour("#009E73", "black", "green"),
    Kind.BACKWARD: Colour("#0072B2", "white", "blue"),
    Kind.INPUT_GRADIENT: Colour("#56B4E9", "black", "blue"),
    Kind.WEIGHT_GRADIENT: Colour("#E69F00", "black", "cyan"),
    Kind.COMMUNICATION: Colour("#CC79A7", "black", "magenta"),
    Kind.OPTIMIZER: Colour("#F0E442", "black", "cyan"),
    Kind.IDLE: Colour("#ECECEC", "#555555", "bright_black"),
}
