"""Trainers of transformers and TRL with exact numbers."""

from __future__ import annotations

from hf_objectives.trainers.causal_lm import (
    PerplexityTrainer,  # `transformers.Trainer` for next-token objectives, with exact numbers
)
from hf_objectives.trainers.causal_lm_config import (
    PerplexityTrainingArguments,  # `transformers.TrainingArguments` with the few that exact objectives need
)
from hf_objectives.trainers.dpo import (
    PerplexityDPOTrainer,  # `trl.DPOTrainer` with exact figures of both answers and of the language model, and two cu
)
from hf_objectives.trainers.dpo_config import (
    PerplexityDPOConfig,  # `trl.DPOConfig` with what is measured, and two cures for chosen answers that become less l
)
from hf_objectives.trainers.guards import (
    ends_of_runs,  # Ids of the last token of each run of trained tokens; int64 [batch, length] labels to int64 [runs]
)
from hf_objectives.trainers.isolation import (
    probe_isolation,  # Pack two documents as the collator does, change the first, and require the second's logits to
)
from hf_objectives.trainers.ppo import (
    PPOTrainer,  # Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) of a language model, as in RL
)
from hf_objectives.trainers.ppo_config import (
    PPOConfig,  # `trl.RLOOConfig` with what PPO adds: generation, rewards, batches and logs are the parent's
)
from hf_objectives.trainers.reward import (
    RewardModelTrainer,  # `trl.RewardTrainer`, a drop-in with its signature, its loss (Bradley and Terry's) and its o
    encode_reward_row,  # One preference row as `RewardModelTrainer` takes it
)
from hf_objectives.trainers.reward_config import (
    RewardModelConfig,  # `trl.RewardConfig` and what encoding needs
)
from hf_objectives.trainers.stream_callback import (
    OrderedStreamCallback,  # Keeps a stream's place with the checkpoints of a Trainer, and goes on there when one is
)
