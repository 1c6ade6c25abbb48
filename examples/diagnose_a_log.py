"""A log that we did not write: a list of numbers with a spike from which the run does not come back."""

from hf_objectives import diagnose, plot_training_metrics

losses = [4.0 - 2.5 * (1 - 0.97**step) for step in range(120)] + [3.4 + 0.01 * (step % 3) for step in range(80)]
log = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
for finding in diagnose(log):
    print(finding.severity, finding.kind, finding.steps, finding.evidence, finding.advice, sep="; ")
print(plot_training_metrics(log, "runs/diagnose.png"))
