"""Exact perplexity as a module of evaluate, without a network."""

import evaluate

from hf_objectives import demo
from hf_objectives.evaluation import module_path

tokenizer = demo.build_tokenizer()
model = demo.build_model(tokenizer, hidden_size=32, num_layers=1).eval()
texts = [row["text"] for row in demo.texts(4)]
print(evaluate.load(module_path("perplexity")).compute(predictions=texts, model=model, tokenizer=tokenizer))
