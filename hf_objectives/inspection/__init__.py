"""Show what is trained, before anything is trained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.inspection.findings import (
        SEVERITIES,  # the severities, from harmless to fatal
        Finding,  # one thing that is noteworthy about a run
        Severity,  # "info", "warning" or "error"
    )
    from hf_objectives.inspection.label_preview import (
        ENVIRONMENT,  # file name of versions and settings in an output folder
        LABELS,  # file name of the label preview in an output folder
        save_environment,  # write versions, device, number of processes and settings, without secrets
        save_label_preview,  # write a few encoded rows as text, trained and untrained pieces apart
        without_secrets,  # settings as JSON values, without tokens, keys and passwords
    )
    from hf_objectives.inspection.page import (
        write_page,  # write an inspection as one HTML page
    )
    from hf_objectives.inspection.rows import (
        QUANTILES,  # shares at which the lengths of rows are reported
        Inspection,  # what a look at rows found
        inspect_rows,  # encode rows as `prepare_dataset` does, and look at the result
    )
    from hf_objectives.inspection.safe_text import (
        figure_text,  # a number as people read it
        visible,  # text with its control characters shown as pictures
        write_template,  # write an HTML page from a template, text escaped
    )
    from hf_objectives.inspection.token_texts import (
        MASKS,  # columns that mark trained tokens where a row or a batch has no labels
        marked_runs,  # texts of the runs of trained and of untrained tokens
    )
    from hf_objectives.inspection.types import (
        InspectedRow,  # one row as it will be trained, or a row that is left out
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
