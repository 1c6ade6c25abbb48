"""Sources with weights to one stream of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.mixture.build import build_mixture  # several sources as one dataset, each with its share
    from hf_objectives.mixture.config import (
        MixtureConfig,  # what to mix and how
        SourceConfig,  # one source of a mixture
        StageConfig,  # other weights from some point of the run on
        number,  # read a setting as a number; YAML reads 1e9 as a string
    )
    from hf_objectives.mixture.dataset import DatasetMixture  # the stream of rows, with state, report and look-up
    from hf_objectives.mixture.laws import (
        LAWS,  # the forms of a mixing law, by name
        MEAN,  # the form of a law where the mixture does not matter
        MIN_TRIALS,  # fewest trials to fit a law to
        FittedLaw,  # how one loss depends on the weights
        fit_law,  # fit the law that predicts a loss best
    )
    from hf_objectives.mixture.recommendation import (
        COMBINED,  # name of the combination of all losses
        Recommendation,  # the best weights, with errors and notes
        check_combination,  # check that losses can be combined
        recommend,  # find the best weights under fitted laws
        summarise,  # a search as JSON values
    )
    from hf_objectives.mixture.report import (
        MixtureReport,  # a mixture at one moment
        SourceReport,  # one source at one moment
    )
    from hf_objectives.mixture.schedule import mixture_schedule  # the source of each of n draws
    from hf_objectives.mixture.weights import draw_mixtures  # mixtures to try in a search for the best weights
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
