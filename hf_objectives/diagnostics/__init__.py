"""What a run did: logs, detectors, monitor, plots, report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.diagnostics.batch_record import (
        excerpt,  # the part of a marked text where training begins
        marked_text,  # the text of a row, trained parts marked
        replay,  # compute a batch that the monitor kept again
    )
    from hf_objectives.diagnostics.callback import (
        DiagnosticsCallback,  # watches every step of a Trainer: ours, transformers' or TRL's
    )
    from hf_objectives.diagnostics.curves import (
        Curves,  # the log of one run: a series per curve, notes, and the steps of resumes
        read_curves,  # read the log of one run, in any format
        read_runs,  # read the logs of one or several runs
    )
    from hf_objectives.diagnostics.detect import (
        diagnose,  # find what is wrong with one or several runs
        nothing_found,  # what it means that nothing was found in a run
    )
    from hf_objectives.diagnostics.mixture import (
        plot_mixture,  # draw the share of each source, asked for and realised, and its epochs
        report_of_log,  # the last report of a mixture in a log
    )
    from hf_objectives.diagnostics.plot import (
        plot_reward_model,  # draw a reward model's training and calibration
        plot_rewards,  # draw a run of reinforcement learning
        plot_training_metrics,  # draw the curves of one or several runs, with findings marked
    )
    from hf_objectives.diagnostics.report import (
        write_report,  # write the report of a run as one HTML file
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
