"""What became of files: an edited model beside the original, and the original back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

from abliterate.texts.terminal import plain, write

if TYPE_CHECKING:
    from abliterate.record import IntegrityPart, UndonePart


#: What a comparison may find wrong, in words.
_WRONG = {
    "damaged": "differ outside the plan",
    "reshaped": "have another dtype or shape",
    "missing": "are missing",
    "extra": "are not in the original",
    "headers": "have another header",
    "wrong_hashes": "have another SHA-256 than recorded",
}


def show_integrity(part: IntegrityPart, console: Console) -> None:
    """What was compared and what is wrong."""
    for field, words in _WRONG.items():
        names: list[str] = getattr(part, field)
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            write(console, plain(f"{words}:", "red"), f" {', '.join(names[:5])}{more}", whole=True)
    planned = len(part.changed) + len(part.unchanged)
    write(
        console,
        f"{planned} tensors in the plan, {len(part.changed)} of them changed; {len(part.sha256)} weight files hashed.",
    )
    if part.not_original:
        write(console, plain("not the original's:", "red"), f" {', '.join(part.not_original)}", whole=True)
    for names, words in (
        (part.unknown, "neither the original's nor results that the record knows"),
        (part.changed_files, "not as the record says, or gone"),
    ):
        if names:
            write(console, plain(f"{words}:", "red"), f" {', '.join(names)}", whole=True)
    if not part.proved:
        why = " the record is of an earlier version, without hashes of the files beside the weights."
        write(console, plain("Not proved:", "red"), why, whole=True)
    if part.rewritten:
        write(console, f"Rewritten by the edit: {', '.join(part.rewritten)}.", whole=True)
    if part.of_hub:
        write(console, f"Added by the hub, no part of the model: {', '.join(part.of_hub)}.", whole=True)
    if part.intact:
        write(console, "Verified: every byte outside the plan equals the original's.")


def show_undone(undone: UndonePart, console: Console) -> None:
    """Whether it is the original or close to it, and where it lies."""
    if undone.exact:
        write(console, "Restored bit for bit: weights with the SHA-256 of the original's.")
    else:
        write(console, _restored(undone), whole=True)
    if undone.remains:
        write(console, f"Still as the edit left it: {', '.join(undone.remains)}.", whole=True)
    if undone.others:
        write(console, f"Left where they were, not known to the record: {', '.join(undone.others)}.", whole=True)
    write(console, "Model: ", plain(undone.folder, "bold"), whole=True)


def _restored(undone: UndonePart) -> str:
    """How close computed tensors come to the original's, and why they were computed."""
    told = f"Restored {len(undone.tensors)} tensors"
    if undone.steps is None:
        return (
            f"{told} from what the edit kept: {undone.reason}. How close they are to the original is not known: "
            "nothing was kept to compare them with."
        )
    equal = 100 * undone.equal / undone.compared
    return (
        f"{told} to within {undone.steps} unit in the last place of the stored format, from what the edit kept: "
        f"{undone.reason}. Compared with {undone.compared:,} numbers of the original, {equal:.1f} % are equal."
    )
