"""Our mask for trainers that read it from the template: TRL's `assistant_only_loss`, axolotl, LLaMA-Factory.

python examples/generation_template.py
"""

from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from hf_objectives import demo
from hf_objectives.labels import generation_template

tokenizer = demo.build_tokenizer()
tokenizer.chat_template = generation_template(tokenizer)  # and tokenizer.save_pretrained(folder), for other programs
rows = [{"messages": row["messages"]} for row in demo.chats(40) if "tools" not in row]
trainer = SFTTrainer(
    demo.build_model(tokenizer, hidden_size=32, num_layers=1),
    SFTConfig("runs/marked", assistant_only_loss=True, max_steps=2, use_cpu=True, bf16=False, report_to="none"),
    train_dataset=Dataset.from_list(rows),
    processing_class=tokenizer,
)
row = trainer.train_dataset[0]
print(tokenizer.decode([label for label in row["labels"] if label != -100]))
trainer.train()
