"""Rules of the weight of expert tokens."""

from __future__ import annotations

from chord_megatron.algorithm.expert_weights import EXPERT_WEIGHTS
from chord_megatron.config import ChordConfig
from chord_megatron.planning.unread import refuse_unread
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import did_you_mean, shown
from chord_megatron.system.user_functions import is_user_function


def expert_weight_name(chord: ChordConfig) -> str:
    """`chord.expert_weight`, or what ms-swift's key says."""
    return chord.expert_weight or ("phi" if chord.chord_enable_phi_function else "uniform")


def check_expert_weight(chord: ChordConfig) -> None:
    """That there is such a weight, and its keys are for it. Raises UserError."""
    name = expert_weight_name(chord)
    if name not in EXPERT_WEIGHTS and not is_user_function(name):
        raise UserError(
            f"chord.expert_weight={shown(name)} is unknown; use {', '.join(EXPERT_WEIGHTS)} or path.py:function"
            + did_you_mean(name, [*EXPERT_WEIGHTS])
        )
    if chord.chord_enable_phi_function and name != "phi":
        raise UserError(
            f"chord.chord_enable_phi_function=true asks for chord.expert_weight=phi, which is {shown(name)}; "
            "remove one of them"
        )
    readers = {"expert_weight_cutoff": "phi", "luffy_gamma": "luffy"}
    unread = (key for key, reader in readers.items() if reader != name)
    refuse_unread("chord", chord, unread, f"chord.expert_weight={name}")
