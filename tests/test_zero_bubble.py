"""Zero-bubble schedules in the settings of their paper: its formulas exactly, and gains of the right sign."""

from __future__ import annotations

import pytest

from meshwright.bench.zero_bubble import LEFT, SETTINGS, Setting, gains_of
from meshwright.schedule import Action, ActionKind, actions, replay


def unit_time(action: Action) -> float:
    return 2.0 if action.kind is ActionKind.B else 1.0


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
@pytest.mark.parametrize("name", LEFT)
def test_equal_times_give_the_paper_s_bubbles(setting: Setting, name: str) -> None:
    p, chunks = setting.ranks, 2 if name == "ZBVZeroBubble" else 1
    for m in setting.num_microbatches:
        base = replay(actions("1F1B", p, 1, m), unit_time, p)
        found = replay(actions(name, p, chunks, m), unit_time, p * chunks)
        assert base.bubble_fraction == pytest.approx((p - 1) / (m + p - 1), rel=1e-9)
        gain = chunks * base.period_s / found.period_s  # a chunk is half a stage
        assert gain == pytest.approx((m + p - 1) / (m + LEFT[name] * (p - 1)), rel=1e-9)


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_models_of_the_paper_gain(setting: Setting) -> None:
    for gain in gains_of(setting, setting.num_microbatches[0]):
        assert 1 < gain.simulated < gain.formula + 0.05
