"""Self-Refine: the model criticises its answer and follows the critique, by prompts alone (arXiv:2303.17651).

Reproduces   the loop: answer, critique, improved answer, until the critique says that nothing is wrong or the turns
             are used up. Nothing is trained: it is the control that every trained method has to beat.
Differs      The next answer sees the last answer and its critique, not the whole history; the prompts are our own and
             without examples.
"""

from __future__ import annotations

from upturn.lab.lab import Lab
from upturn.recipes._base import Run, begin, part


class Config(Run):
    """One measurement; `measure.turns` answers at most."""


def run(cfg: Config, lab: Lab) -> None:
    """Measure plain refinement, then refinement by critique."""
    model = begin(cfg, lab)
    strategy = part("strategies", "critique_refine", turns=cfg.measure.turns)
    with_critique = cfg.measure.model_copy(update={"strategy": strategy})
    lab.measure(model, with_critique, "self-refine", scorer=cfg.scorer)
