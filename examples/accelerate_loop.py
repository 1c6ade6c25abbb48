"""A loop of one's own under accelerate, with packed rows and the exact loss: total nats over total tokens."""

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

from hf_objectives import DataCollatorWithEosPacking, demo, prepare_dataset

tokenizer = demo.build_tokenizer()
rows = prepare_dataset(demo.chats(60), tokenizer, max_length=128)
loader = DataLoader(
    rows, batch_size=4, collate_fn=DataCollatorWithEosPacking(tokenizer, max_length=128, train_on="all")
)
model = demo.build_model(tokenizer, hidden_size=32, num_layers=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
accelerator = Accelerator(cpu=True)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

for batch in loader:
    columns = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    logits = model(**columns).logits[:, :-1].float()
    labels = batch["labels"][:, 1:]
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="sum")
    tokens = accelerator.reduce((labels != -100).sum(), "sum")  # of all processes, over which gradients are averaged
    loss = nats * accelerator.num_processes / tokens
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
print(loss.item())
