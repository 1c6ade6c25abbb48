"""What the numbers mean: exact counts, perplexity, figures of preference pairs, calibration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.evaluation.answers import (
        Answered,  # what was said to a prompt, and what the row has there
        Asked,  # a prompt and its answer, as ids
        check_answers,  # check the settings of generated answers
        evaluate_answers,  # answer held-out prompts, and score the answers
        find_answers,  # prompts and answers of encoded rows
        module_path,  # a module of ours for `evaluate.load`
    )
    from hf_objectives.evaluation.calibration import (
        Reliability,  # confidence against accuracy, in bins
        wilson_interval,  # the 95 % interval of a share
    )
    from hf_objectives.evaluation.causality import (
        probe_causality,  # no token sees those after it, or an error
        probed_logits,  # logits of a probe, with the same dropout in every call
        refuse_other_models,  # what is no causal language model, or lacks embeddings
    )
    from hf_objectives.evaluation.counts import (
        EvaluationCounts,  # the sums of an evaluation, in all and per source
        TokenCount,  # nats, tokens and bytes; gives loss, perplexity and bits per byte
    )
    from hf_objectives.evaluation.documents import (
        DocumentLoss,  # the loss, source and row of one document
        document_losses,  # the loss of each document of a batch, packed or not
    )
    from hf_objectives.evaluation.harness import (
        check_tasks,  # check that tasks of lm-evaluation-harness are known
        evaluate_tasks,  # run such tasks on a live model
    )
    from hf_objectives.evaluation.head import (
        After,  # what a model does after its head: scaling and soft-capping
        after_head,  # that of a model, proven on the live model
        unwrapped,  # the model inside wrappers for data parallelism
    )
    from hf_objectives.evaluation.language_model import (
        EvaluatesLanguageModels,  # a mixin for Trainers: `evaluate` measures `eval_lm_datasets` too
        LanguageModelEvaluation,  # named datasets, encoded once, and their perplexity under a model
    )
    from hf_objectives.evaluation.logits import (
        HeadInputs,  # what a head makes logits from
        at_head,  # compute something in place of logits, where the head's weight is whole
        next_token_outputs,  # the loss, head and loss in one, and what else the model returned
        predicting_places,  # where something is predicted
        selected_logits,  # logits of chosen positions only
        split_extra_columns,  # the model's inputs, and the columns for loss and evaluation
        target_nll,  # negative log-likelihood of each target
        token_score_outputs,  # log-probabilities of single tokens, and all outputs, from one forward pass
        virtual_tokens,  # tokens that a model of PEFT learns beside the row
    )
    from hf_objectives.evaluation.pair_losses import PairLoss  # the losses of DPO over a whole set of pairs
    from hf_objectives.evaluation.pair_rewards import PairRewards  # rewards of preference pairs, and metrics over them
    from hf_objectives.evaluation.pair_scores import (
        PairScores,  # log-probabilities of a batch of pairs under policy and reference
        by_column,  # figures of pairs by their names
        nats_per_token,  # mean loss of the tokens of both sides
        pair_figures,  # metrics of an evaluation over pairs
        unique_rows,  # the pairs of all ranks, each once
    )
    from hf_objectives.evaluation.perplexity import (
        compute_perplexity,  # exact perplexity of texts
        count_batch,  # nats, tokens and bytes of one batch
    )
    from hf_objectives.evaluation.vocabulary import (
        check_vocabulary,  # every token has an embedding, or an error
        num_embeddings,  # ids that a model has embeddings for
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
