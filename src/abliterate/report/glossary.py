"""The words of tables, help and reports, each in a sentence. docs/glossary.md is this page; a test holds it."""

from __future__ import annotations

GLOSSARY: dict[str, str] = {
    "residual stream": "The vector of width d_model that every block of a transformer reads from and adds to, one per "
    "token.",
    "resid_pre, layer": "The residual stream where it enters a block. Layer 0 is the output of the embedding, layer L "
    "the output of the last block, before the final norm.",
    "site": "A layer, and a position counted from the end of the rendered prompt (−1 is its last token).",
    "writer": "Parameters whose product is added to the residual stream: embeddings, the output maps of attention, "
    "MLPs, experts and state-space layers, each with its bias.",
    "residual accounting": "The test, before any edit, that every writer was found: with all known writers edited, "
    "nothing may be added along the direction. Otherwise the run stops and names the block.",
    "contrastive set": "Harmful and harmless instructions in train, validation and test parts without duplicates; "
    "directions are made of the first, chosen by the second, and measured on the third.",
    "direction, r̂": "The unit vector along r = mean(harmful) − mean(harmless) of the residual stream at one site.",
    "projection": "r̂ᵀx, the coordinate of a vector along the direction. Remaining projection: ‖r̂ᵀW′‖ / ‖r̂ᵀW‖, what an "
    "edited weight still writes along it.",
    "ablation, orthogonalise": "To take the direction out of what writers write: y − r̂r̂ᵀy by hooks while the model "
    "runs, W − r̂r̂ᵀW in its weights.",
    "strength": "How much of the projection is taken out: 1 removes it, 0 changes nothing, below 0 strengthens it.",
    "addition, steering": "To add r to the residual stream at one layer, instead of taking it out; or to scale, clamp "
    "or cap the projection there, while the model runs.",
    "coefficient": "How much of a direction steering adds, in units of ‖r‖ where that was measured: 1 adds r, −1 takes "
    "it away.",
    "broken": "A reply that is degenerate, where behaviour is set against the coefficient.",
    "refusal tokens": "First tokens with which this model's own refusals start.",
    "refusal score": "log p − log(1 − p), with p the next-token probability of the refusal tokens together.",
    "bypass": "Mean refusal score on harmful prompts with the direction ablated; low is good.",
    "induce": "Mean refusal score on harmless prompts with r added at its own layer; high is good.",
    "KL": "KL(original ‖ edited) in nats: how far the distribution of the next token moved. At the first token of the "
    "answer, or per token along the original's own reply.",
    "ΔNLL of own replies": "Change of the negative log-likelihood, in nats per token, that the model gives to the "
    "original's own replies to harmless prompts.",
    "d′, AUROC": "How far apart harmful and harmless prompts lie along a direction: difference of means in standard "
    "deviations; and the probability that a harmful prompt lies further than a harmless one (0.5 is chance).",
    "words alone, length alone": "AUROC of a bag of words, and of the prompts' length, without any model: what "
    "separation of the sets would be worth by itself.",
    "plan": "The edit as data: for each writer what is taken out and how strongly. Hooks, weights, adapters and GGUF "
    "are realisations of one plan.",
    "control": "A random direction on the same writers at the same strengths: what any edit would have done.",
    "refused": "The share of judged replies that turn down all or a part of the request, with a 95 % interval; "
    "corrected: with the judge's known errors taken out.",
    "degenerate": "A reply that is empty, loops or is broken text: neither a refusal nor an answer.",
    "evasion": "A reply that turns nothing down and delivers nothing: a lecture, a help line, the premise denied, "
    "another topic. It counts with the refusals.",
    "cut off": "A reply that ended by length before it had come to anything: no verdict until replies are longer.",
    "borderline": "Safe prompts that sound dangerous; refusing them is over-refusal.",
    "held-out prompts": "Prompts used neither to find nor to choose the edit.",
    "front": "Several edits from light to strong, none of which is better than another in both refusals and damage.",
    "knee": "The point of the front farthest below the straight line between its ends.",
    "p": "The probability of changes as one-sided as these if the edit changed nothing (McNemar's exact test on the "
    "same prompts before and after).",
}
