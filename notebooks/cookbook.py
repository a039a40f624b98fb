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

model = ab.load(MODEL)
hf, tokenizer = model.hf_model, model.tokenizer
model


# %%
def same(mine, theirs, tolerance=0.03):
    """Whether two results are the same but for rounding: the length of their difference beside that of the second.

    In bfloat16 a number has three digits, and batches are added up in another order. In float32 it is 1e-4 and less.
    """
    mine, theirs = torch.as_tensor(mine).double().cpu(), torch.as_tensor(theirs).double().cpu()
    error = float((mine - theirs).norm() / theirs.norm())
    assert error < tolerance, error
    return f"relative difference {error:.1e}"


# %% [markdown]
# `model.find` does steps 1 to 5. It is called first, so that its numbers can stand beside those by hand.

# %%
PROMPTS = {"limit": 24}
found = model.find(positions=1, **PROMPTS)
found

# %% [markdown]
# ## 1. Prompts
#
# Two sets that differ in one thing: the model refuses one and answers the other. The package brings 500 of each. They are
# split: directions are made of `train`, chosen by `val`, and measured on `test`, which nothing has seen before.

# %%
texts = ab.load_prompts(**PROMPTS)
print(texts.counts)
print(sorted({prompt.category for prompt in texts.harmful.train}))
texts.harmless.train[:3]

# %% [markdown]
# This model refuses about half of the harmful ones. Only prompts that behave as their set says are used: by the log-odds that the
# first token of the reply is one with which it begins refusals. (Which tokens these are was found with the model's own replies. By
# rounding a prompt whose odds are even may count here and not there.)

# %%
refusal_tokens = found.findings.ids
print([tokenizer.decode([one]) for one in refusal_tokens])


def tokens(prompt):
    """A prompt by the chat template, as the arguments of the model."""
    chat = [{"role": "user", "content": str(prompt)}]
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(chat, **options).to(hf.device)


def score(prompt):
    """The log-odds that the reply begins as a refusal."""
    return float(hf(**tokens(prompt)).logits[0, -1].double().softmax(-1)[refusal_tokens].sum().logit())


def behaving(split):
    """Harmful prompts that are refused and harmless ones that are not."""
    return (
        [prompt for prompt in getattr(texts.harmful, split) if score(prompt) > 0],
        [prompt for prompt in getattr(texts.harmless, split) if score(prompt) < 0],
    )


harmful, harmless = behaving("train")
print("by hand:", len(harmful), len(harmless), "  model.find:", dict(found.findings.trained_on))

# %% [markdown]
# ## 2. Activations at every layer, at the last token
#
# Each prompt is put into the chat template, up to where the reply would begin. What the model has understood by then is in
# the residual stream of the last token. *Site* l is what enters block l; transformers calls it `hidden_states[l]`.


# %%
def stream_by_hand(prompts):
    """The residual stream at every site but the last, [n, L, d]."""
    rows = []
    for prompt in prompts:
        states = hf.model(**tokens(prompt), output_hidden_states=True).hidden_states
        rows.append(torch.stack([state[0, -1].float().cpu() for state in states[:-1]]))  # the last: behind the norm
    return torch.stack(rows)


bad, good = stream_by_hand(harmful), stream_by_hand(harmless)
print(bad.shape)
same(bad, model.activations(harmful)[:, :-1])

# %% [markdown]
# ## 3. Difference of means
#
# r = mean(harmful) − mean(harmless), at every site.

# %%
r = bad.mean(0) - good.mean(0)

layer = found.site.layer
candidates = found.findings.candidates
print("‖r‖ by hand", round(float(r[layer].norm()), 2), "  model.find:", round(float(candidates.norms[0, layer]), 2))
cosine = torch.nn.functional.cosine_similarity(r[layer], candidates.raw[0, layer], dim=0)
print(f"cosine {cosine:.4f}")
assert cosine > 0.99

# %% [markdown]
# ## 4. Normalise
#
# The direction is r̂ = r / ‖r‖. Its length grows with depth, as everything in the stream does: it says nothing of which
# layer is best.

# %%
unit = r / r.norm(dim=-1, keepdim=True).clamp_min(1e-9)
direction = unit[layer]
print([round(float(one.norm()), 2) for one in r[::4]])

# %% [markdown]
# `model.ablate` and the others take the tensor as it is. From activations in one step:

# %%
same(ab.Direction.from_activations(bad[:, layer], good[:, layer], site=found.site).basis[0], direction)

# %% [markdown]
# ## 5. Choose by evaluation
#
# Which site? Not the one where the classes lie furthest apart, but the one whose direction *does* it. Without the direction,
# harmful prompts should no longer be refused (*bypass*: their mean log-odds); with it added, harmless ones should (*induce*); and other
# replies should stay as they are (*KL*).

# %%
writers = [hf.model.embed_tokens]
for block in hf.model.layers:
    writers += [block.self_attn.o_proj, block.mlp.down_proj]


def ablate_by_hand(direction):
    """Hooks that take a direction out of whatever is written to the stream."""
    direction = direction.to(hf.device)

    def hook(module, args, output):
        wide = output.float()
        return (wide - (wide @ direction)[..., None] * direction).to(output.dtype)

    return [writer.register_forward_hook(hook) for writer in writers]


def add_by_hand(layer, vector):
    """A hook that adds a vector where the stream enters a block."""
    vector = vector.to(hf.device, hf.dtype)
    block = hf.model.layers[layer]
    return [block.register_forward_pre_hook(lambda module, args: (args[0] + vector, *args[1:]))]


def hooked(handles, prompts):
    """The mean score while hooks are there."""
    try:
        return sum(map(score, prompts)) / len(prompts)
    finally:
        for handle in handles:
            handle.remove()


asked_bad, asked_good = behaving("val")
by_hand = (hooked(ablate_by_hand(direction), asked_bad), hooked(add_by_hand(layer, r[layer]), asked_good))
chosen = found.selection.chosen
print(f"no intervention: harmful {found.selection.harmful:6.2f}, harmless {found.selection.harmless:6.2f}")
print(f"by hand:          bypass {by_hand[0]:6.2f},   induce {by_hand[1]:6.2f}")
print(f"model.find:       bypass {chosen.bypass:6.2f},   induce {chosen.induce:6.2f}")
assert abs(by_hand[0] - chosen.bypass) < 0.5
assert abs(by_hand[1] - chosen.induce) < 0.5

# %% [markdown]
# `model.find` did this for all sites below 80 % of the depth, few prompts for all and more for the best, and measured KL
# beside it. Of the sites with induce > 0 and KL ≤ 0.1 it takes the one with the least bypass.

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
handles = ablate_by_hand(direction)
by_hand = hf(**tokens(prompt)).logits[0, -1]
for handle in handles:
    handle.remove()
with model.ablate(direction):
    by_library = hf(**tokens(prompt)).logits[0, -1]
print(same(by_hand, by_library))


def refused(prompts):
    """How many replies are refusals."""
    replies = model.answer(prompts, max_new_tokens=16)
    return sum(ab.judge(reply).label == "refusal" for reply in replies)


asked = texts.harmful.test
before = refused(asked)
with model.ablate(direction):
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
r_hat = direction.to(hf.device)
by_hand, size = {}, {}
for name, weight in hf.named_parameters():
    old = weight.float()
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        change = torch.outer(r_hat, r_hat @ old)
    elif name.endswith("embed_tokens.weight"):
        change = torch.outer(old @ r_hat, r_hat)
    else:
        continue
    by_hand[name], size[name] = (old - change).to(weight.dtype), float(change.norm())

model.apply_(direction)
errors = {name: float((hf.get_parameter(name) - one).float().norm()) / size[name] for name, one in by_hand.items()}
with_weights = hf(**tokens(prompt)).logits[0, -1]
model.restore()
print(f"{len(errors)} weights; they differ by at most {max(errors.values()):.1e} of the change")
assert max(errors.values()) < 0.05
error = float((with_weights - by_library).norm() / by_library.norm())
print(f"logits with weights and with hooks: relative difference {error:.1e}")

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
