"""The inner optimizer as it acts: facts about its step, a stand-in, learned hyperparameters."""

from .facts import Facts, Prober, born_state, needs_closure, parameters_of, unwrapped
from .gradient import Change, Gradients, SeenGradient, unchanged
from .learned import learn_hyperparameter, learned, numbers, plain, relink, resolved
from .stand_in import StepHook, standing_in, step_hooks, take_step, twin

__all__ = [
    "Change",
    "Facts",
    "Gradients",
    "Prober",
    "SeenGradient",
    "StepHook",
    "born_state",
    "learn_hyperparameter",
    "learned",
    "needs_closure",
    "numbers",
    "parameters_of",
    "plain",
    "relink",
    "resolved",
    "standing_in",
    "step_hooks",
    "take_step",
    "twin",
    "unchanged",
    "unwrapped",
]
