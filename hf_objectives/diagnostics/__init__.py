"""What a run did: logs, detectors, monitor, plots, report."""

from __future__ import annotations

from hf_objectives.diagnostics.batch_record import (
    excerpt,  # A part of a marked text that shows where training begins, with a little of what stands before it
)
from hf_objectives.diagnostics.calibration_plot import (
    plot_reward_model,  # Draw loss and accuracy over steps, and a reliability diagram: how often choices of a confide
)
from hf_objectives.diagnostics.callback import (
    DiagnosticsCallback,  # Watches every step of a Trainer (ours, transformers', TRL's)
)
from hf_objectives.diagnostics.curves import (
    Curves,  # The log of one run
    read_curves,  # The log of one run
    read_runs,  # The logs of one or several runs: what `read_curves` takes, a folder of run folders, or a list of pat
)
from hf_objectives.diagnostics.detect import (
    diagnose,  # Look at the log of one or several runs
    nothing_found,  # What it means that `diagnose` found nothing in a run: that it is sound only where there was enou
)
from hf_objectives.diagnostics.mixture import (
    plot_mixture,  # Draw the share of each source, asked for and realised, and its passes
    report_of_log,  # What a run's log last says of its mixture; `row` is the step
)
from hf_objectives.diagnostics.plot import (
    FORMATS,
    plot_training_metrics,  # Draw what the log has of loss, perplexity, learning rate, gradient norm, tokens a second
)
from hf_objectives.diagnostics.replay import replay
from hf_objectives.diagnostics.report import (
    write_report,  # Write the report of a run
)
from hf_objectives.diagnostics.rewards import (
    plot_rewards,  # Draw reward, distance from the reference, lengths of answers, and how the steps go
)
