"""A mixture by tokens in a Trainer: after any number of tokens each source is within one document of its share."""

from datasets import Dataset

from hf_objectives import (
    DataCollatorWithEosPacking,
    PerplexityTrainer,
    PerplexityTrainingArguments,
    build_mixture,
    demo,
)

tokenizer = demo.build_tokenizer()
sources = {
    "chats": {"dataset": Dataset.from_list([{"messages": row["messages"]} for row in demo.chats(60)]), "weight": 0.75},
    "texts": {"dataset": Dataset.from_list(demo.texts(60)), "weight": 0.25},
}
mixture = build_mixture({"sources": sources, "packing": "across", "max_length": 128}, tokenizer=tokenizer, seed=0)
trainer = PerplexityTrainer(
    demo.build_model(tokenizer, hidden_size=32, num_layers=1),
    PerplexityTrainingArguments("runs/mixture", max_steps=4, use_cpu=True, report_to="none"),
    DataCollatorWithEosPacking(tokenizer, max_length=128, train_on="all"),
    train_dataset=mixture,
    processing_class=tokenizer,
)
trainer.train()
print(mixture.report(trainer.rows_taken))
