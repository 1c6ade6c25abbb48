"""Our collator in TRL's SFTTrainer, on rows as they are."""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_objectives import DataCollatorForAssistantOnlyLM, demo

tokenizer = demo.build_tokenizer()
rows = Dataset.from_list([{"messages": row["messages"]} for row in demo.chats(40) if "tools" not in row])
trainer = SFTTrainer(
    demo.build_model(tokenizer, hidden_size=32, num_layers=1),
    SFTConfig(
        "runs/sft_trainer",
        max_steps=2,
        use_cpu=True,
        bf16=False,
        report_to="none",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    ),
    data_collator=DataCollatorForAssistantOnlyLM(tokenizer, max_length=128),
    train_dataset=rows,
    processing_class=tokenizer,
)
print(trainer.train().training_loss)
