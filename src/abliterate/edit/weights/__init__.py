"""A plan as weights: streaming surgery on the original safetensors files, which never loads the model.

Every file is read once and written once, tensor by tensor; a planned tensor passes through in blocks of rows. Memory
stays at a few blocks whatever the size of the checkpoint, and bytes outside the plan are copied, not decoded. What is
needed to take the edit back is written beside the model.

    numbers     the arithmetic of one block, forwards and backwards
    tensors     stored tensors of any rank as blocks; what a plan does to each
    passes      one tensor on its way through an edit; what it leaves of the direction
    undo_files  what undo needs, on disk
    edit        a whole checkpoint
    live        saved tensors in a live model; a plan in its own
"""

from abliterate.edit.weights.edit import Surgery, edit_checkpoint, one_thread, removed_rows
from abliterate.edit.weights.live import SwappedWeights, edit_live, weights_from
from abliterate.edit.weights.tensors import planned_parameters, refusal

__all__ = [
    "Surgery",
    "SwappedWeights",
    "edit_checkpoint",
    "edit_live",
    "one_thread",
    "planned_parameters",
    "refusal",
    "removed_rows",
    "weights_from",
]
