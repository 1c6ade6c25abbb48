"""Our collator in transformers' own Trainer: the assistant's tokens alone are trained."""

from transformers import Trainer, TrainingArguments

from hf_objectives import DataCollatorForAssistantOnlyLM, demo

tokenizer = demo.build_tokenizer()
trainer = Trainer(
    demo.build_model(tokenizer, hidden_size=32, num_layers=1),
    TrainingArguments("runs/plain_trainer", max_steps=2, remove_unused_columns=False, use_cpu=True, report_to="none"),
    DataCollatorForAssistantOnlyLM(tokenizer, max_length=128),
    train_dataset=demo.chats(40),
)
print(trainer.train().training_loss)
