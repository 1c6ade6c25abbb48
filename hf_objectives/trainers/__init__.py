"""Trainers of transformers and TRL with exact numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_objectives import import_on_use

if TYPE_CHECKING:
    from hf_objectives.trainers.causal_lm import (
        PerplexityTrainer,  # `transformers.Trainer` for next-token objectives
    )
    from hf_objectives.trainers.causal_lm_config import (
        PerplexityTrainingArguments,  # its arguments
    )
    from hf_objectives.trainers.checkpoints import (
        CheckpointSettings,  # settings of all trainers that save checkpoints
        find_checkpoint,  # the whole checkpoint to go on from
    )
    from hf_objectives.trainers.distillation import (
        PerplexityDistillationTrainer,  # `trl.DistillationTrainer` with exact figures, and given answers too
    )
    from hf_objectives.trainers.distillation_config import (
        PerplexityDistillationConfig,  # `trl.DistillationConfig` with `lmbda` and settings of what is measured
    )
    from hf_objectives.trainers.distillation_rows import (
        encode_distillation_row,  # one row as `PerplexityDistillationTrainer` takes it
    )
    from hf_objectives.trainers.dpo import (
        PerplexityDPOTrainer,  # `trl.DPOTrainer` with exact figures and two cures for falling answers
    )
    from hf_objectives.trainers.dpo_config import (
        PerplexityDPOConfig,  # `trl.DPOConfig` with settings of what is measured
    )
    from hf_objectives.trainers.hf_compat import (
        StepWatch,  # what `watch_steps` calls
        attention_of,  # the name of a model's attention implementation
        copies_of_rows,  # processes that are given the same rows
        origin_of,  # the folder or Hub id that a model was loaded from
        prepared_batch,  # a batch on the device of the run
        stop_ids,  # the EOS ids of a generation config or a tokenizer
        train_batch_size,  # rows of a training batch on one process
        watch_steps,  # watch batches, losses and gradient norms of any Trainer
    )
    from hf_objectives.trainers.hf_hub import (
        check_repository,  # make or find the repository of a run, before anything is loaded
        reason_of,  # why a request to the Hub failed, in one line
    )
    from hf_objectives.trainers.hub_contents import (
        CARD,  # the name of a model card
        CARD_FILES,  # the card, and what it rests on
        EVALUATED,  # the name of the file that `verify` reads
        MODEL_FILES,  # the files of a model
        listed_files,  # the files of a folder that patterns name
        model_files,  # the files of the model in a folder
    )
    from hf_objectives.trainers.isolation import (
        probe_isolation,  # prove that packed documents do not see each other
    )
    from hf_objectives.trainers.ppo import (
        PPOTrainer,  # proximal policy optimisation on TRL's generation and rewards
    )
    from hf_objectives.trainers.ppo_config import (
        PPOConfig,  # its arguments
    )
    from hf_objectives.trainers.reward import (
        RewardModelConfig,  # `trl.RewardConfig` with the settings of encoding
        RewardModelTrainer,  # `trl.RewardTrainer` with exact figures
        encode_reward_row,  # one preference row as `RewardModelTrainer` takes it
    )
    from hf_objectives.trainers.stream_callback import (
        OrderedStreamCallback,  # keeps a stream's place in the checkpoints of any Trainer
    )
    from hf_objectives.trainers.termination import (
        RunTerminated,  # ends a program at SIGTERM, when its checkpoint is saved
    )
    from hf_objectives.trainers.trackers import (
        guard_trackers,  # let a run outlast its trackers
        log_samples,  # texts to the trackers that take them
    )
    from hf_objectives.trainers.trl_compat import (
        suppress_seqcls_warning,  # a context in which a new score head is no warning
    )
else:
    __getattr__, __dir__ = import_on_use(__name__, __file__)
