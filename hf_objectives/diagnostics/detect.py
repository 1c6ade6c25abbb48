"""Say what is wrong with a run, from its log: findings with evidence and advice.

`RULES` and `ADVICE` are the tables of what is looked for and of what to do. Noise is measured in each run, by medians. From
which size on a change matters (a tenth of the loss, a thirtyfold gradient, 0.1 nats) is the same for all runs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from hf_objectives.diagnostics import detect_alignment, detect_data, detect_evaluation, detect_loss, detect_optimizer
from hf_objectives.diagnostics.curves import Curves, OneLog, read_runs
from hf_objectives.diagnostics.run_view import ENOUGH, RunView, Sign
from hf_objectives.errors import FileFormatError
from hf_objectives.inspection import SEVERITIES, Finding

logger = logging.getLogger(__name__)
_FLOOD = 5  # spikes of one severity that are reported one by one


#: What is looked for, by the kind of the finding. Each function gives what it saw; its docstring says what that is.
RULES: dict[str, tuple[Callable[[RunView], Iterable[Sign]], ...]] = {
    "non_finite": (detect_optimizer.non_finite, detect_optimizer.filtered_nan),
    "spike_recovered": (detect_loss.early_rise, detect_loss.recovered_spikes),
    "spike_sustained": (detect_loss.sustained_spikes,),
    "not_decreasing": (detect_loss.no_gradient, detect_loss.rises_in_few_points, detect_loss.never_falls),
    "plateau": (detect_loss.plateau,),
    "overfitting": (detect_evaluation.rises, detect_evaluation.learned_by_heart),
    "too_good": (detect_evaluation.too_good,),
    "gradient_explosion": (detect_optimizer.gradient_explosion,),
    "schedule_fault": (detect_optimizer.zero_rate, detect_optimizer.rate_leaps),
    "sawtooth": (detect_data.sawtooth,),
    "few_supervised_tokens": (detect_data.nothing_trained, detect_data.few_trained),
    "mixture_drift": (detect_data.mixture_drift,),
    "falling_chosen": (detect_alignment.falling_chosen,),
    "reward_hacking": (detect_alignment.reward_hacking,),
    "entropy_collapse": (detect_alignment.entropy_collapse,),
    "length_growth": (detect_alignment.length_growth,),
}
#: What to do, the likeliest cause first, by the kind of the finding. `{step}` stands for its first step.
ADVICE = {
    "non_finite": "A few infinite gradient norms are how an fp16 loss scaler finds its scale. Otherwise go back to the "
    "checkpoint before, use bf16 or a lower loss scale, lower the learning rate, and look at the batch "
    "(DiagnosticsCallback writes it). A loss of 0 is a NaN that the Trainer filtered: set "
    "logging_nan_inf_filter=False.",
    "spike_recovered": "Look at the batch of this step for poorly formatted rows; DiagnosticsCallback names them. Clip "
    "gradients (max_grad_norm), or leave such steps out (on_spike='skip'). In the first steps: lower the rate, or "
    "warm up longer.",
    "spike_sustained": "Go back to the checkpoint before. Look at the learning rate there and at the data from this "
    "step on: a fault of the schedule, or a corrupted shard.",
    "not_decreasing": "The learning rate is too high (look for a growing gradient norm) or far too low, weights get no "
    "gradient (frozen, detached, or left out of the optimizer), labels do not belong to their inputs, or data loading "
    "has a bug. Try to overfit one batch.",
    "plateau": "More steps bring nothing. Raise the learning rate or warm up longer. Then look at the data: too little, "
    "too repetitive, or labels that cannot be learned. Then use a larger model, or train more of its weights.",
    "overfitting": "Take the checkpoint of step {step} (load_best_model_at_end). More or more varied data, fewer "
    "epochs, a lower learning rate, dropout or weight decay, a smaller model or LoRA.",
    "too_good": "No natural text is that predictable. Check whether the model sees its labels (not shifted, no causal "
    "mask, the answer in the prompt), whether evaluation rows are trained, and which tokens are trained "
    "(hf-objectives inspect).",
    "gradient_explosion": "Clip gradients (max_grad_norm=1.0), lower the learning rate or warm up longer. Where it is "
    "one step, look at its batch.",
    "schedule_fault": "If this is not meant: a schedule for another number of steps (nothing is trained at a rate of "
    "0), a resumed run with another schedule, a scheduler that is stepped twice, or a wrong lr_scheduler_type. Warm "
    "up after a restart.",
    "sawtooth": "The order of the data repeats: sorted by source or length, or shards read one after another. Shuffle "
    "the whole dataset, not a buffer, with another seed in every epoch; mix sources (build_mixture).",
    "few_supervised_tokens": "Look at the labels (hf-objectives inspect): a template whose answers are not found, "
    "answers cut off by max_length, or very long prompts. A loss of 0 without a gradient norm in the log may also be "
    "a NaN that was filtered.",
    "mixture_drift": "A source is exhausted (max_epochs), its rows have another length than the weights assume "
    "(unit='tokens'), or a resume lost the mixture's state.",
    "falling_chosen": "The margin grows because both answers become less likely. Add the likelihood of the chosen "
    "answers (nll_weight, rpo_alpha or dpop_lambda), raise beta, lower the learning rate, or fine-tune on the chosen "
    "answers first.",
    "reward_hacking": "The policy leaves what the reward model was trained on: read its answers. Raise beta or set "
    "kl_target, stop earlier, lower the learning rate, or mend the reward.",
    "entropy_collapse": "The policy always samples one answer, so there is nothing left to compare. Add an entropy "
    "bonus (entropy_coef), raise the temperature or beta, lower the learning rate, or take an earlier checkpoint.",
    "length_growth": "The reward prefers long answers, or answers no longer end. Read them, and look at the share of "
    "finished ones. Penalise length or a missing stop token, and balance the lengths of the reward's training pairs.",
}


def diagnose(log: OneLog | Sequence[OneLog] | Mapping[str, OneLog]) -> list[Finding]:
    """Look at the log of one or several runs.

    Args:
        log: what `read_runs` takes: a path, a Trainer's `log_history`, or several of them.

    Returns:
        Findings by run, the worst first and those of one severity by step; none for a healthy run. Severity "info" is worth
        knowing and no fault.

    Raises:
        FileFormatError: there is no log, nothing in it can be read, or no curve has two points.
        ConfigError: a package is missing that reads it.
    """
    runs = read_runs(log)
    if all(run.points < 2 for run in runs):
        raise FileFormatError(f"{runs[0].name}: one point is no curve; expected at least two logged steps")
    found: list[Finding] = []
    for run in runs:
        if run.points < 2:
            logger.warning("%s: one point is no curve; it was not judged", run.name)
            continue
        name = run.name if len(runs) > 1 else ""
        found += [replace(finding, run=name) for finding in _without_echoes(_findings(RunView(run)))]
    return sorted(found, key=lambda finding: (finding.run, -SEVERITIES.index(finding.severity), finding.step))


def nothing_found(run: Curves) -> str:
    """Say what it means that `diagnose` found nothing: a run is sound only where there was enough to judge."""
    points = len(run.get("loss").steps)
    if not points:
        return "Nothing was found, but the log has no training loss to judge."
    if points < ENOUGH:
        return f"Nothing was found, but there are too few points to judge most things ({points}; {ENOUGH} are needed)."
    return "Nothing is wrong that a log can show."


def _findings(run: RunView) -> list[Finding]:
    found = [
        Finding(kind, step, severity, evidence, ADVICE[kind].format(step=f"{step:,}"), last_step)
        for kind, cases in RULES.items()
        for case in cases
        for severity, step, last_step, evidence in case(run)
    ]
    for severity in SEVERITIES:
        alike = [finding for finding in found if (finding.kind, finding.severity) == ("spike_recovered", severity)]
        if len(alike) > _FLOOD:
            first, last = alike[0], alike[-1]
            evidence = f"{len(alike)} spikes, the first: {first.evidence}; the last at {last.steps}"
            found = [finding for finding in found if finding not in alike]
            found.append(replace(first, last_step=last.last_step, evidence=evidence))
    return found


def _without_echoes(found: list[Finding]) -> list[Finding]:
    """Leave out what another finding of the run says better: a run that is NaN does not "plateau" after it."""
    kinds = {finding.kind for finding in found}
    broken = [finding for finding in found if finding.severity == "error"]
    kept = []
    for finding in found:
        after_break = finding.kind in ("plateau", "not_decreasing", "sawtooth") and any(
            other.kind == "non_finite" or (other.kind == "spike_sustained" and other.step <= finding.last_step)
            for other in broken
        )
        rises = finding.kind == "plateau" and "not_decreasing" in kinds
        toothed = finding.kind in ("plateau", "not_decreasing") and "sawtooth" in kinds
        if finding.kind == "spike_recovered" and "sawtooth" in kinds:
            finding = replace(finding, severity="info")  # a tooth is no spike
        if not (after_break or rises or toothed):
            kept.append(finding)
    return kept
