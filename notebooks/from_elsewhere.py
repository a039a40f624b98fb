# %% [markdown]
# # From heretic, or from the paper's code, to here
#
# Who has a direction, settings or an edited model from elsewhere can go on with them. This notebook says what is called what, uses a direction tensor of the
# paper's form, gives an edit with strengths by depth, as heretic makes them, in this library's words, and compares an edited model with the
# original. The edits are stand-ins made here; no code of either project is used.
#
# | in the paper's code (Arditi et al. 2024) | here |
# | --- | --- |
# | `mean_diffs` [positions, layers, d] | `found.direction.candidates.raw`, positions −1 … −k, sites 0 … L |
# | `pos`, `layer` of the metadata | `ab.Site(layer, pos)` |
# | refusal tokens listed by model family | `found.findings.tokens`, found with the model itself |
# | bypass score, steering score, KL | `bypass`, `induce`, `kl` of `found.to_pandas()` |
# | ablation hooks | `model.ablate(direction)` |
# | activation addition, coefficient −1 | `model.add(direction, -1.0)` |
# | orthogonalised weights | `model.apply_(direction)`, `model.save(direction, "out")` |
#
# | in heretic | here |
# | --- | --- |
# | good and bad prompts | harmless and harmful prompts |
# | `direction_index`, one for all layers | an `ab.Direction`, interpolated between two sites |
# | a direction for each layer | `ab.Direction(…, per_site=…)` |
# | `max_weight`, `max_weight_position`, `min_weight`, `min_weight_distance` of a component | `strengths="mlp@14=0.9,…"` |
# | row normalisation | `norm_preserving=True` (keeps the length of columns, what each input writes) |
# | trials; refusals and KL as objectives | `model.search()`: by gradient, or `method="black-box"` (Optuna) |
# | a trial that is picked | a point: `front[2]`, `front.best` |
# | refusal markers | a judge with known error rates; `ab.judge(reply)` |
# | merged model or adapter | `model.save(direction, "out")`, `as_="lora"` |

# %%
import os

import torch
from safetensors.torch import load_file, save_file

import abliterate as ab

MODEL = os.environ.get("ABLITERATE_MODEL", "Qwen/Qwen2.5-Coder-0.5B-Instruct")
ab.quiet()
torch.set_grad_enabled(False)

model = ab.load(MODEL)
texts = ab.load_prompts(limit=24)
layers = model.anatomy.layers

# %% [markdown]
# ## A direction tensor from elsewhere
#
# Stand-in: mean differences of the paper's form, [positions, layers, d], in a file. (A `.pt` file is a pickle: open one
# that you did not make only with `torch.load(path, weights_only=True)`.)

# %%
POSITIONS = (-2, -1)  # in the paper's order, from the left
bad, good = (
    torch.stack([model.activations(split.train, position=one).mean(0)[:layers] for one in POSITIONS])
    for split in (texts.harmful, texts.harmless)
)
save_file({"mean_diffs": (bad - good).contiguous()}, "mean_diffs.safetensors")

# %%
mean_diffs = load_file("mean_diffs.safetensors")["mean_diffs"]
pos, layer = -1, 17  # what the metadata say beside it
direction = ab.Direction(mean_diffs[pos, layer], site=ab.Site(layer, pos))

asked = texts.harmful.test[:12]


def refused():
    """Of the prompts asked, how many are declined."""
    return sum(ab.judge(reply).label == "refusal" for reply in model.answer(asked, max_new_tokens=24))


before = refused()
with model.ablate(direction):
    ablated = refused()
with model.add(direction, -1.0):
    subtracted = refused()
print(f"of {len(asked)} declined: {before}; direction taken out {ablated}, subtracted at layer {layer} {subtracted}")
assert ablated < before

# %% [markdown]
# A file with one vector or a tensor `basis` is taken as it is: `model.ablate("direction.safetensors")`, or on the command line
# `abliterate apply MODEL --direction direction.safetensors -o out`.
#
# ## Strengths by depth
#
# heretic gives each component (attention and MLP) a weight that is largest at one layer and falls off to both sides, down to a smallest one at a
# distance, beyond which nothing is edited; and a direction between those of two layers. In our words the first is a list of strengths, the
# second a vector. (Its index i is what leaves block i: site i + 1.)


# %%
def by_depth(component, most, position, least, distance):
    """Strengths of a component: `most` at a position, falling to `least` at a distance, nothing beyond."""
    rules = []
    for block in range(layers):
        away = abs(block - position)
        if away <= distance:
            rules.append(f"{component}@{block}={most + away / distance * (least - most):.4f}")
    return rules


index = 16.4
below, above = (mean_diffs[-1, int(index) + 1 + step] for step in (0, 1))
between = torch.lerp(below / below.norm(), above / above.norm(), index % 1)
strengths = ",".join(["*=0", *by_depth("attention", 1.0, 15.2, 0.3, 9.0), *by_depth("mlp", 0.8, 17.5, 0.2, 7.0)])
print(strengths[:64], "…")

with model.ablate(between, strengths=strengths) as plan:
    print(
        f"declined with strengths by depth: {refused()}; {sum(edit.changes for edit in plan.edits)} writers are edited"
    )

# %% [markdown]
# The plan is the same as weights: W′ = W − s r̂ r̂ᵀ W, by hand for one of them.

# %%
edit = max(plan.edits, key=lambda edit: edit.strength)
weight = model.hf_model.get_parameter(edit.writer.weight).clone()
r = (between / between.norm()).to(weight.device)
by_hand = (weight.float() - edit.strength * torch.outer(r, r @ weight.float())).to(weight.dtype)
model.apply_(between, strengths=strengths)
applied = model.hf_model.get_parameter(edit.writer.weight)
error = float((applied - by_hand).float().norm() / (by_hand - weight).float().norm())
print(f"{edit.writer.weight}, strength {edit.strength:.3f}: they differ by {error:.2%} of the change")
assert error < 0.05

# %% [markdown]
# ## An edited model from elsewhere
#
# Now the weights are as another program would have left them. They are written as plain files, and looked at beside the original.

# %%
model.hf_model.save_pretrained("theirs")
model.tokenizer.save_pretrained("theirs")
model.restore()
inspected = ab.inspect("theirs", base=MODEL)
inspected

# %%
assert inspected.verdict == "altered"
behaviour = ab.compare([MODEL, "theirs"], limit=8, max_new_tokens=24)
behaviour

# %% [markdown]
# `ab.compare` also takes MODEL+adapter and MODEL+direction.safetensors, so trials and points of a search can stand in one table. To search here instead:
# `front = model.search(points=8)`; its points cost less KL for the same refusals than one strength for all writers ([search.md](https://github.com/abliterate/abliterate/blob/main/docs/search.md)).
