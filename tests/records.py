"""A record with every part, whose texts are all the same: to see what is done with a hostile one."""

from __future__ import annotations

from abliterate import record as rec

LAYERS, POSITIONS = 4, (-1, -2)


def full_record(text: str = "Name a fruit.", *, redacted: bool = True) -> rec.Record:
    """Everything that a run can leave, with `text` wherever a model, a file or a user could put words."""
    sites = [
        rec.SitePart(
            layer=layer,
            position=position,
            bypass=1.0 - layer,
            induce=layer - 1.5,
            kl=0.03 * layer,
            prompts=16,
            norm=1.0 + layer,
            dprime=float(layer),
            auroc=0.5 + layer / 10,
        )
        for layer in range(1, LAYERS)
        for position in POSITIONS
    ]
    before, after = _behaviour(12), _behaviour(1)
    return rec.Record(
        created="2026-01-02T03:04:05+00:00",
        versions={"abliterate": "0", "python": "3", text: text},
        command=f"abliterate run {text} -o out",
        settings={"model": text, "prompts": {"seed": 7, "harmful": text}},
        model=rec.ModelPart(
            name=text,
            kind="folder",
            architecture=text,
            d_model=8,
            layers=LAYERS,
            dtype="float32",
            device="cpu",
            source_sha256={text: "ab" * 32},
        ),
        prompts=rec.PromptsPart(
            sources={"harmful": text},
            counts={"harmful": {"test": 20}, text: {text: 1}},
            duplicates_dropped=0,
            sha256="cd" * 32,
            system=text,
            chat_template=text,
            shared_prefix_tokens=1,
            positions=2,
        ),
        anatomy=rec.AnatomyPart(writers=9, worst_closure=1e-7, tolerance=1e-3),
        refusal_tokens=[
            rec.TokenPart(token=1, text=text, probability=0.5, probability_answering=0.0, refusals=8, trials=8)
        ],
        separation=rec.SeparationPart(
            sites=[
                rec.SeparatedPart(
                    layer=layer, position=position, auroc=0.5 + layer / 10, dprime=float(layer), norm=float(layer)
                )
                for layer in range(LAYERS + 1)
                for position in POSITIONS
            ],
            layer=3,
            position=-1,
            prompts=[
                rec.ProjectedPart(set=kind, prompt=text, x=x, y=y, refused=refused)
                for kind, x in (("harmful", 2.0), ("harmless", -2.0))
                for y, refused in ((1.0, True), (2.0, False))
            ],
        ),
        selection=rec.SelectionPart(
            chosen=sites[-1],
            met_rule=True,
            control=rec.ControlPart(bypass=0.9, induce=-1.4, kl=0.01, norm=4.0),
            harmful=1.0,
            harmless=-2.0,
            max_kl=0.1,
            min_induce=0.0,
            max_depth=0.8,
            trained_on={"harmful": 100, "harmless": 100},
            candidates=sites,
        ),
        inspection=rec.InspectionPart(
            model=text,
            base=text,
            verdict="altered",
            probability=0.97,
            kind="ablation",
            variant=text,
            also=[text],
            proved=False,
            writers=8,
            layers=[0, 1],
            rank=1,
            directions=text,
            units=[
                rec.WriterTracePart(block=block, kind=kind, strength=0.9, edited=True, tensor=text, size=0.03, read=1.0)
                for block in range(LAYERS)
                for kind in ("attention", "mlp")
            ],
            unchanged=0,
            others=1,
            separation_in=text,
            separation=[rec.LayerSeparationPart(layer=layer, recovered=0.9, own=0.95) for layer in range(LAYERS + 1)],
            harm_known=0.95,
            behaviour=before,
        ),
        audit=rec.AuditPart(
            protocol="1",
            prompts_sha256="cd" * 32,
            layer=2,
            position=-1,
            met_rule=True,
            base=before.harmful,
            rows=[
                rec.AuditRowPart(
                    family="strength",
                    name=text,
                    refused=after.harmful,
                    kl=rec.EstimatePart(value=0.01, ci95=(0.0, 0.02)),
                    edits=9,
                )
            ],
            halving_strength=0.4,
            halving_kl=0.01,
            directions_needed=1,
        ),
        steering=rec.SteeringPart(
            model=text,
            direction=text,
            operation="add",
            tokens="all",
            layers=[2],
            unit="norm",
            lengths=[3.0],
            max_new_tokens=32,
            judge=rec.JudgePart(name=text, fingerprint="1"),
            doses=[
                rec.DosePart(
                    coefficient=coefficient,
                    behaviour={"harmful": _rate(refusals), "harmless": _rate(1)},
                    score={"harmful": 1.0, "harmless": None},
                    kl=_estimate(0.1),
                    repetition={"harmful": _estimate(0.0), "harmless": _estimate(0.1)},
                )
                for coefficient, refusals in ((None, 12), (-1.0, 2), (0.0, 12), (1.0, 20))
            ],
            control=[
                rec.DosePart(
                    coefficient=coefficient,
                    behaviour={"harmful": _rate(12), "harmless": _rate(1)},
                    score={"harmful": 1.0, "harmless": None},
                    kl=_estimate(0.1),
                    repetition={},
                )
                for coefficient in (-1.0, 1.0)
            ],
            answers={
                dose: {
                    "harmful": [
                        rec.AnswerPart(
                            prompt=text,
                            label="refusal",
                            evidence="",
                            tokens=3,
                            text="first words […]" if redacted else text,
                            redacted=redacted,
                        )
                    ]
                }
                for dose in ("none", "-1", "0", "1")
            },
        ),
        search=rec.SearchPart(
            method="gradient",
            objectives=["refusals", "kl"],
            constraints="over-refusals<=+0.02",
            limits={"over-refusals": 0.12},
            base={"refusals": 0.6, "kl": 0.0},
            base_held_out={"refusals": 0.6, "kl": 0.0},
            points=[
                rec.PointPart(
                    number=number,
                    origin=text,
                    file=None,
                    scores={"refusals": 0.1 * number, "kl": 0.05 / number},
                    held_out={"refusals": 0.1 * number + 0.02, "kl": 0.06 / number},
                    intervals={"refusals": (0.1 * number, 0.1 * number + 0.1), "kl": (0.01, 0.07)},
                    feasible=True,
                    on_front=True,
                )
                for number in (1, 2, 3)
            ],
            chosen=2,
            why=text,
            evaluations={"all": 3},
            seconds=12.0,
        ),
        plan=rec.PlanPart(
            strength=1.0,
            rank=1,
            strengths={f"model.layers.{layer}.mlp.down_proj.weight": 0.5 for layer in range(LAYERS)},
            edits=[
                rec.ResidualPart(
                    tensor=f"model.layers.{layer}.mlp.down_proj.weight",
                    writer=text,
                    kind="mlp",
                    dtype="BF16",
                    shape=[8, 8],
                    before=1.0,
                    after=0.5,
                    ratio=0.5,
                    change=0.01,
                )
                for layer in range(LAYERS)
            ],
            left_alone={text: text},
            files=[text],
        ),
        evaluation=rec.EvaluationPart(
            max_new_tokens=32,
            before=before,
            after=after,
            shift=_shift(text),
            answers={
                state: {
                    kind: [
                        rec.AnswerPart(
                            prompt=text,
                            label=label,
                            evidence="",
                            tokens=3,
                            text="first words […]" if redacted and kind == "harmful" else text,
                            redacted=redacted and kind == "harmful",
                        )
                    ]
                    for kind in ("harmful", "harmless")
                }
                for state, label in (("before", "refusal"), ("after", "compliance"))
            },
            decoding=rec.DecodingPart(name="model", asked={text: text}, seed=1, samples=2),
            judge=rec.JudgePart(
                name=text,
                fingerprint="1",
                calibrations=[
                    rec.UsedCalibrationPart(
                        rates=["harmful", text],
                        labels=text,
                        sensitivity=(9, 10),
                        specificity=(9, 10),
                        model=text,
                        why=text,
                    )
                ],
            ),
            paired={"harmful": _paired()},
            categories={"before": {text: _rate(5), "other": _rate(6)}, "after": {text: _rate(0), "other": _rate(1)}},
            paired_categories={text: _paired()},
            control=rec.ControlEffectPart(
                seed=0, behaviour=before, paired={}, shift=_shift(text), size=0.01, size_of_edit=0.02
            ),
            capability=[
                rec.CapabilityPart(
                    task=text, metric="acc", n=50, before=_estimate(0.5), after=_estimate(0.48), change=_estimate(-0.02)
                )
            ],
        ),
        warnings=[text],
        left_out=[text],
        output=text,
        output_sha256={text: "ef" * 32},
        timings_s={"find model": 1.5},
        peak_memory_bytes={"find model": 10**9},
        work={"find model": rec.WorkPart(forward=123_456_789, backward=1, head=7)},
    )


def _rate(refusals: int) -> rec.RatePart:
    rate = refusals / 20
    return rec.RatePart(
        refusals=refusals, degenerate=0, n=20, rate=rate, ci95=(max(0.0, rate - 0.1), min(1.0, rate + 0.1))
    )


def _behaviour(refusals: int) -> rec.BehaviourPart:
    return rec.BehaviourPart(harmful=_rate(refusals), harmless=_rate(1), borderline=_rate(refusals // 2))


def _estimate(value: float) -> rec.EstimatePart:
    return rec.EstimatePart(value=value, ci95=(value - 0.05, value + 0.05))


def _paired() -> rec.PairedPart:
    return rec.PairedPart(both=1, before_only=11, after_only=0, neither=8, unknown=0, p=0.001, change=_estimate(-0.55))


def _shift(text: str) -> rec.ShiftPart:
    return rec.ShiftPart(
        kl_first_token=0.02,
        kl_first_token_ci95=(0.01, 0.03),
        kl_reply=0.005,
        kl_reply_ci95=(0.004, 0.006),
        nll_before=0.5,
        nll_after=0.51,
        nll_change=_estimate(0.01),
        worst=[rec.MovedPart(prompt=text, kl_reply=0.1)],
        prompts=20,
        tokens=400,
    )
