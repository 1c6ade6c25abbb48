"""What is trained, seen before training."""

from __future__ import annotations

from hf_objectives.inspection.findings import (
    SEVERITIES,  # Severities from harmless to fatal
    Finding,  # One thing that is noteworthy about a run
    Severity,  # "info", "warning" or "error"
)
from hf_objectives.inspection.label_preview import (
    ENVIRONMENT,
    LABELS,
    save_environment,  # Write versions, device, number of processes and settings as JSON, without secrets
    save_label_preview,  # Write a few encoded rows as text, trained and untrained pieces apart
)
from hf_objectives.inspection.page import (
    write_page,  # Write the page
)
from hf_objectives.inspection.rows import (
    QUANTILES,
    Inspection,  # What a look at rows found
    inspect_rows,  # Encode rows as `prepare_dataset` does and look at what comes of it
)
from hf_objectives.inspection.safe_text import (
    script_hash,  # the hash by which a page allows one script
    script_json,  # JSON that may stand inside a script element
    visible,  # text with its control characters shown as pictures
)
from hf_objectives.inspection.token_texts import (
    MASKS,  # Columns that mark trained tokens where a row or a batch has no labels, in order of preference
    marked_runs,  # Texts of the runs of trained and of untrained tokens, in order; they join to the decoded row
)
from hf_objectives.inspection.types import (
    InspectedRow,  # One row as it will be trained, or as it would have been
)
