"""Sources with weights to one stream of rows."""

from __future__ import annotations

from hf_objectives.mixture.build import (
    build_mixture,  # Several sources as one dataset, each with its share at every moment
)
from hf_objectives.mixture.config import (
    MixtureConfig,  # A mixture
    SourceConfig,  # One source of a mixture
    StageConfig,  # Other weights from some point of the run on
    number,  # A setting as a number; YAML reads 1e9 as a string
)
from hf_objectives.mixture.dataset import (
    DatasetMixture,  # Rows of several sources, without an end unless every source has one (`max_epochs`)
)
from hf_objectives.mixture.report import (
    MixtureReport,  # A mixture at one moment
    SourceReport,  # One source at one moment
)
from hf_objectives.mixture.schedule import (
    mixture_schedule,  # The source of each of n draws: after any number of them every source is within one draw of it
)
