# %% [markdown]
# # Reading and steering
#
# A direction in the residual stream can be read (how far along it is this prompt?), taken out, and added. This notebook does all
# three with refusal, and then adds and removes another one, the language of the reply.

# %%
import os

import matplotlib.pyplot as plt
import torch

import abliterate as ab

MODEL = os.environ.get("ABLITERATE_MODEL", "Qwen/Qwen2.5-Coder-0.5B-Instruct")
ab.quiet()
torch.set_grad_enabled(False)

model = ab.load(MODEL)
found = model.find(limit=24, positions=1)
found

# %% [markdown]
# ## Read
#
# `model.activations` is the stream at every site, [prompts, sites, d]. Its projections on r̂, site by site, on prompts that the
# direction was not made of:

# %%
texts = ab.load_prompts(limit=24)
r = found.direction.basis[0]
read = {
    name: model.activations(split.test) @ r
    for name, split in (("harmful", texts.harmful), ("harmless", texts.harmless))
}

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2))
for name, values in read.items():
    left.plot(values.T, color="C3" if name == "harmful" else "C0", alpha=0.3, linewidth=0.8)
    right.hist(values[:, found.site.layer], bins=12, color="C3" if name == "harmful" else "C0", alpha=0.6, label=name)
left.set(xlabel="site", ylabel="projection on r̂", title="each line a prompt")
right.set(xlabel="projection on r̂", title=f"site {found.site.layer}")
right.legend()
plt.show()

# %% [markdown]
# At the last tokens, which are the chat template's and so the same for every prompt. This is where it is read off when the reply begins:


# %%
def along(prompt, last=5):
    """The stream at the last tokens of a prompt along the direction."""
    chat = [{"role": "user", "content": str(prompt)}]
    ids = model.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    states = model.hf_model.model(**ids.to(model.hf_model.device), output_hidden_states=True).hidden_states
    pieces = [repr(model.tokenizer.decode([one]))[1:-1] for one in ids["input_ids"][0, -last:]]
    return pieces, states[found.site.layer][0, -last:].float().cpu() @ r


figure, axes = plt.subplots(figsize=(10, 3))
for name, split in (("harmful", texts.harmful), ("harmless", texts.harmless)):
    values = []
    for prompt in split.test[:8]:
        pieces, one = along(prompt)
        values.append(one)
    axes.plot(torch.stack(values).mean(0), marker="o", color="C3" if name == "harmful" else "C0", label=name)
axes.set_xticks(range(len(pieces)), pieces)
axes.set(ylabel="projection on r̂, mean of 8")
axes.legend()
plt.show()

# %% [markdown]
# ## Take out, more or less of it
#
# Strength 1 takes the direction out of everything that writes to the stream; 0.5 takes half of it; above 1 it is turned around, and below 0
# strengthened. The score is the mean log-odds that the first token is one of a refusal.

# %%
refusal_tokens = found.findings.ids


def score(prompts):
    """Mean log-odds of a refusal at the first token."""
    scores = []
    for prompt in prompts:
        chat = [{"role": "user", "content": str(prompt)}]
        ids = model.tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.hf_model.device)
        p = model.hf_model(**ids).logits[0, -1].double().softmax(-1)[refusal_tokens].sum()
        scores.append(p.logit())
    return float(torch.stack(scores).mean())


groups = {"harmful": texts.harmful.test[:8], "harmless": texts.harmless.test[:8]}
strengths = [-0.5, 0.0, 0.5, 1.0, 1.5]
taken = {name: [] for name in groups}
for strength in strengths:
    with model.ablate(found, strength=strength):
        for name, prompts in groups.items():
            taken[name].append(score(prompts))

# %% [markdown]
# ## Add
#
# The other way: `coefficient` times r, the difference of means itself, is added where the stream enters the layer that it was measured at.

# %%
coefficients = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
added = {name: [] for name in groups}
for coefficient in coefficients:
    with model.add(found, coefficient):
        for name, prompts in groups.items():
            added[name].append(score(prompts))

figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
for ax, xs, scores, label in (
    (axes[0], strengths, taken, "strength of ablate"),
    (axes[1], coefficients, added, "coefficient of add"),
):
    for name, values in scores.items():
        ax.plot(xs, values, marker="o", color="C3" if name == "harmful" else "C0", label=name)
    ax.axhline(0, color="grey", linewidth=0.8)
    ax.set(xlabel=label)
axes[0].set(ylabel="log-odds of a refusal")
axes[0].legend()
plt.show()
assert taken["harmful"][3] < taken["harmful"][1]
assert added["harmless"][4] > added["harmless"][2]

# %% [markdown]
# A question that nobody would decline:

# %%
question = "What is the capital of France?"
print("as it is:  ", model.chat(question, max_new_tokens=16))
with model.add(found, 1.5):
    print("with 1.5 r:", model.chat(question, max_new_tokens=24))

# %% [markdown]
# ## A direction of your own
#
# Any contrast makes one. Here the same questions are asked with "Answer in French." and with "Answer in English.", and r is the
# difference at the last token, layer by layer. A mapping from layer to vector adds each at its own layer.

# %%
questions = [
    "What do bees make?",
    "Name a colour of the sky.",
    "What is bread made of?",
    "Where do fish live?",
    "Who wrote Hamlet?",
    "What is a volcano?",
]
states = {
    language: model.activations([f"{question} Answer in {language}." for question in questions])
    for language in ("French", "English")
}
difference = states["French"].mean(0) - states["English"].mean(0)  # [sites, d]
french = {layer: difference[layer] for layer in range(16, 22)}

asked = ["What is the sun?", "Name three fruits."]
for coefficient in (0.0, 0.2, 0.4, 0.6):
    with model.add(french, coefficient):
        print(coefficient, [reply[:50] for reply in model.answer(asked, max_new_tokens=12)])

# %% [markdown]
# Too much breaks the language model: that is what sweeps are for. One layer does much less: at layer 14 alone twice its vector changes no
# language here.
#
# Taking it out is another question: does the model still answer in French when it is told to?

# %%
told = [f"{question} Answer in French." for question in asked]
print("as it is:   ", [reply[:50] for reply in model.answer(told, max_new_tokens=12)])
with model.ablate(difference[18]):
    print("without it: ", [reply[:50] for reply in model.answer(told, max_new_tokens=12)])

# %% [markdown]
# Refusal is special in that one direction is enough to stop it; most behaviours are written in more than one. The vectors as a file for llama.cpp:
# `model.save(found, "out", as_="control-vector")`.
