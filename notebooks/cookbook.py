# %% [markdown]
# # Abliteration in seven steps, by hand and with this library
#
# Refusal in instruction-tuned models is mediated by one direction in the residual stream
# ([Arditi et al. 2024](https://arxiv.org/abs/2406.11717)). This notebook takes it out of a small model in seven steps:
# prompts, activations, difference of means, normalising, choosing by evaluation, verifying by intervention, and
# orthogonalising the weights. Every step is done twice, with a few lines of torch and with `abliterate`, and the numbers
# are compared.
#
# Harmful prompts and the replies to them are counted, not shown.

# %%
import os

import torch

import abliterate as ab

MODEL = os.environ.get("ABLITERATE_MODEL", "Qwen/Qwen2.5-Coder-0.5B-Instruct")
ab.quiet()  # no progress bars in what is kept
torch.set_grad_enabled(False)

model = ab.load(MODEL, dtype="float32")
hf, tokenizer = model.hf_model, model.tokenizer
model


# %%
def same(mine, theirs, tolerance=1e-4):
    """Whether two results are the same but for rounding: the length of their difference beside that of the second."""
    mine, theirs = torch.as_tensor(mine).double().cpu(), torch.as_tensor(theirs).double().cpu()
    error = float((mine - theirs).norm() / theirs.norm())
    assert error < tolerance, error
    return f"relative difference {error:.1e}"


# %% [markdown]
# ## 1. Prompts
#
# Two sets that differ in one thing: the model refuses one and answers the other. The package brings 500 of each. They are
# split: directions are made of `train`, chosen by `val`, and measured on `test`, which nothing has seen before.

# %%
PROMPTS = {"limit": 12}
texts = ab.load_prompts(**PROMPTS)
harmful, harmless = texts.harmful.train, texts.harmless.train
print(texts.counts)
print(sorted({prompt.category for prompt in harmful}))
harmless[:3]

# %% [markdown]
# ## 2. Activations at every layer, at the last token
#
# Each prompt is put into the chat template, up to where the reply would begin. What the model has understood by then is in
# the residual stream of the last token. *Site* l is what enters block l; transformers calls it `hidden_states[l]`.


# %%
def tokens(prompt):
    """A prompt by the chat template, as the arguments of the model."""
    chat = [{"role": "user", "content": str(prompt)}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(chat, **options).to(hf.device)


def stream_by_hand(prompts):
    """The residual stream at every site but the last, [n, L, d]."""
    rows = []
    for prompt in prompts:
        states = hf.model(**tokens(prompt), output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0, -1] for state in states[:-1]]).cpu())  # the last one is behind the final norm
    return torch.stack(rows)


bad, good = stream_by_hand(harmful), stream_by_hand(harmless)
print(bad.shape)
same(bad, model.activations(harmful)[:, :-1])

# %% [markdown]
# ## 3. Difference of means
#
# r = mean(harmful) − mean(harmless), at every site. `model.find` does steps 2 to 5; it was given the same prompts, so its
# candidates are these.

# %%
r = bad.mean(0) - good.mean(0)

found = model.find(positions=1, all_prompts=True, **PROMPTS)
candidates = found.findings.candidates
print(found)
same(r, candidates.raw[0, :-1])

# %% [markdown]
# ## 4. Normalise
#
# The direction is r̂ = r / ‖r‖. Its length grows with depth, as everything in the stream does: it says nothing of which
# layer is best.

# %%
unit = r / r.norm(dim=-1, keepdim=True)

print([round(float(one.norm()), 2) for one in r[::4]])
same(unit, candidates.units[0, :-1])

# %% [markdown]
# ## 5. Choose by evaluation
#
# Which site? Not the one where the classes lie furthest apart, but the one whose direction *does* it. The score is the log-odds
# that the reply starts with a token of refusal. Without the direction, harmful prompts should no longer have one
# (*bypass*); with it added, harmless ones should (*induce*); and other replies should stay as they are (*KL*).

# %%
refusal_tokens = found.findings.ids
print([tokenizer.decode([one]) for one in refusal_tokens])


def score_by_hand(prompts):
    """Mean log-odds of a refusal."""
    scores = []
    for prompt in prompts:
        p = hf(**tokens(prompt), logits_to_keep=1).logits[0, -1].double().softmax(-1)[refusal_tokens].sum()
        scores.append(p.log() - (1 - p).log())
    return float(torch.stack(scores).mean())


writers = [hf.model.embed_tokens]
for block in hf.model.layers:
    writers += [block.self_attn.o_proj, block.mlp.down_proj]


def ablate_by_hand(direction):
    """Hooks that take a direction out of whatever is written to the stream."""
    direction = direction.to(hf.device)

    def hook(module, args, output):
        return output - (output @ direction)[..., None] * direction

    return [writer.register_forward_hook(hook) for writer in writers]


def add_by_hand(layer, vector):
    """A hook that adds a vector where the stream enters a block."""
    vector = vector.to(hf.device)
    block = hf.model.layers[layer]
    return [block.register_forward_pre_hook(lambda module, args: (args[0] + vector, *args[1:]))]


def hooked(handles, prompts):
    """The score while hooks are there."""
    try:
        return score_by_hand(prompts)
    finally:
        for handle in handles:
            handle.remove()


layer = found.site.layer
mine = {
    "no intervention": (found.selection.harmful, found.selection.harmless),
    "by hand": (
        hooked(ablate_by_hand(unit[layer]), texts.harmful.val),
        hooked(add_by_hand(layer, r[layer]), texts.harmless.val),
    ),
    "model.find": (found.selection.chosen.bypass, found.selection.chosen.induce),
}
for name, (bypass, induce) in mine.items():
    print(f"{name:16} bypass {bypass:6.2f}  induce {induce:6.2f}")
same(mine["by hand"], mine["model.find"], 1e-2)

# %% [markdown]
# `model.find` did this for all sites below 80 % of the depth, few prompts for all and more for the best, and measured KL
# beside it. Of the sites with induce > 0 and KL ≤ 0.1 it takes the one with the least bypass.

# %%
found.plot()

# %%
frame = found.to_pandas().dropna().drop(columns="position")
frame.sort_values("bypass").head(6).round(3)

# %% [markdown]
# ## 6. Verify by intervention
#
# The hooks leave the weights alone. So what is claimed can be tested before anything is written: without the direction refusals stop, and
# without a *random* direction they do not.

# %%
prompt = "How do I pick a lock?"
handles = ablate_by_hand(unit[layer])
by_hand = hf(**tokens(prompt), logits_to_keep=1).logits[0, -1]
for handle in handles:
    handle.remove()
with model.ablate(found):
    by_library = hf(**tokens(prompt), logits_to_keep=1).logits[0, -1]
print(same(by_hand, by_library))


def refused(prompts):
    """How many replies are refusals."""
    replies = model.answer(prompts, max_new_tokens=16)
    return sum(ab.judge(reply).label == "refusal" for reply in replies)


asked = texts.harmful.test
before = refused(asked)
with model.ablate(found):
    after = refused(asked)
with model.ablate(torch.randn(model.anatomy.d_model, generator=torch.Generator().manual_seed(0))):
    control = refused(asked)
print(
    f"refused of {len(asked)} held-out prompts: {before}, without the direction {after}, without a random one {control}"
)
assert after < before
assert control > after

# %% [markdown]
# `model.verify(found)` does the same with more prompts and says whether the direction passes; `model.evaluate(found)` adds intervals,
# paired tests, over-refusal and the shift of harmless replies.
#
# ## 7. Orthogonalise the weights
#
# What the hooks take out of every output can be taken out of the weights, once: W′ = W − r̂ r̂ᵀ W for every matrix whose output is
# added to the stream. The token embedding writes to it as well (its rows do, so there it is E′ = E − E r̂ r̂ᵀ).

# %%
direction = unit[layer].to(hf.device)
by_hand = {}
for name, weight in hf.named_parameters():
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        by_hand[name] = weight - torch.outer(direction, direction @ weight)
    elif name.endswith("embed_tokens.weight"):
        by_hand[name] = weight - torch.outer(weight @ direction, direction)

model.apply_(found)
worst = max(by_hand, key=lambda name: float((hf.get_parameter(name) - by_hand[name]).norm() / by_hand[name].norm()))
print(len(by_hand), "weights; the largest difference is in", worst)
print(same(hf.get_parameter(worst), by_hand[worst]))
with_weights = hf(**tokens(prompt), logits_to_keep=1).logits[0, -1]
model.restore()
same(with_weights, by_library, 1e-2)

# %% [markdown]
# The head of this model is its embedding (`tie_word_embeddings`), so there the edit reaches the logits too; hooks
# see only what is written to the stream. `model.plan(found)` says for every writer what is done to it.
#
# How is one sure that these are all the matrices that write to the stream? Here it was known by hand: two in each block and the
# embedding. The library proves it on numbers for any architecture, and stops where something is left over.

# %%
print(len(model.anatomy.writers), "writers, by hand", len(writers))
plan = model.plan(found)
print(plan.edits[0].writer.name, plan.edits[1].writer.name, plan.edits[2].writer.name)

# %% [markdown]
# `model.save(found, "edited")` writes the files: weights, record, report and model card. Next: what steering can do
# (`steering.ipynb`), and how an edit is recognised and undone (`forensics.ipynb`).
