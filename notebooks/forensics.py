# %% [markdown]
# # What was done to this download?
#
# A model from a hub may have had a direction taken out of it. This notebook makes one, as another program would leave it (weights, no record),
# and looks at it: beside the original, alone, and what cannot be said alone. Then it puts things back.

# %%
import os
from pathlib import Path

import torch
from safetensors import safe_open

import abliterate as ab

MODEL = os.environ.get("ABLITERATE_MODEL", "Qwen/Qwen2.5-Coder-0.5B-Instruct")
ab.quiet()
torch.set_grad_enabled(False)

model = ab.load(MODEL)
texts = ab.load_prompts(limit=24)
LAYER = 17
bad, good = (model.activations(split.train)[:, LAYER] for split in (texts.harmful, texts.harmless))
direction = ab.Direction.from_activations(
    bad, good, site=(LAYER, -1), prompts=[*texts.harmful.train, *texts.harmless.train]
)


def download(name, strength):
    """A stand-in for a model that somebody else has edited: plain files."""
    model.apply_(direction, strength=strength)
    model.hf_model.save_pretrained(name)
    model.tokenizer.save_pretrained(name)
    model.restore()
    return name


download("download", 1.0)
sorted(path.name for path in Path("download").iterdir())

# %% [markdown]
# ## Beside the model it was made from
#
# Tensor by tensor: what differs, whether the difference has low rank, and along which direction of the stream.

# %%
beside = ab.inspect("download", base=MODEL, save="recovered.safetensors")
beside

# %%
recovered = ab.load_direction("recovered.safetensors")
cosine = float((recovered.basis @ direction.basis.T).norm())
print(f"verdict: {beside.verdict}; cosine of the recovered direction with the one taken out: {cosine:.4f}")
assert beside.verdict == "altered"
assert cosine > 0.99

# %% [markdown]
# ## Alone
#
# Without the original there is only what the weights say by themselves. A direction taken out of everything that writes to the stream leaves a hole:
# nothing writes along it any more. No forward pass is needed, and no code of the download runs.

# %%
alone = ab.inspect("download")
alone

# %%
assert alone.verdict == "altered"
print(f"probability {alone.probability:.4f}, {alone.writers} writers, decided: {alone.decided}")

# %% [markdown]
# What it can claim: at full strength the hole is plain, in these weights as in others: of 96 models from which nothing had been taken out, none is
# called altered. What it cannot: less than half of a direction leaves a shallow dip, which other things make too (on this model ten of
# ten directions are seen at strength 0.5, none at 0.4). So "no trace" without a base is `decided: False`: it means that nothing was found,
# not that nobody touched the model. `rule_out=1.0` asks whether an edit of that strength would have been seen in these very weights.
# The figures for many models, edits and formats are in
# [forensics.md](https://github.com/abliterate/abliterate/blob/main/docs/forensics.md).
#
# ## What was taken out can be put to the test
#
# The recovered direction is a direction like any other: added to the edited model it should bring refusals back, taken out of the original it should
# stop them.

# %%
asked = texts.harmful.test[:12]


def refused():
    """Of the prompts asked, how many are declined."""
    return sum(ab.judge(reply).label == "refusal" for reply in model.answer(asked, max_new_tokens=24))


before = refused()
with model.ablate("recovered.safetensors"):
    after = refused()
print(f"the original declines {before} of {len(asked)}, without the recovered direction {after}")
assert after < before

# %% [markdown]
# ## Put back
#
# With the original at hand, exactly:

# %%
ab.repair("download", base=MODEL, out="repaired")


# %%
def weights(folder):
    """All tensors of a folder."""
    found = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        if path.name.startswith("model"):
            with safe_open(path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    return found


live, repaired = model.hf_model.state_dict(), weights("repaired")
assert all(torch.equal(live[name].cpu(), tensor) for name, tensor in repaired.items())
print(len(repaired), "tensors are the original's, to the last bit")

# %% [markdown]
# ## An edit that says so
#
# What this library writes carries a record, so whoever downloads it can check that nothing else was touched, and take it back.

# %%
model.save(direction, "edited")
ab.verify_files("edited")

# %%
ab.undo("edited", target="back")

# %%
back = weights("back")
assert all(torch.equal(live[name].cpu(), tensor) for name, tensor in back.items())

path = Path("edited/model.safetensors")
with path.open("r+b") as file:  # somebody turns one bit
    file.seek(-1000, 2)
    byte = file.read(1)
    file.seek(-1000, 2)
    file.write(bytes([byte[0] ^ 1]))
ab.verify_files("edited")

# %% [markdown]
# `ab.audit(MODEL)` asks the other way round: how much does it take to make a model stop refusing, and what does that cost?
# `ab.harden` spreads refusal over several directions and measures whether that helped.
