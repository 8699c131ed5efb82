"""Fine-tune a language model without a cluster and without backpropagation: python docs/plain.py MODEL [STEPS]."""

import sys
from pydoc_data.topics import topics

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoray

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
text = " ".join(" ".join(topics.values()).split()[:20000])
rows = tokenizer(text, return_tensors="pt").input_ids[0].unfold(0, 64, 64)


def batch(step, direction):
    ids = rows[torch.arange(8).add(128 * step + 8 * direction) % len(rows)]
    return {"input_ids": ids, "labels": ids}


replica = zoray.Replica(model, run_seed=0)
for step in range(int(sys.argv[2]) if len(sys.argv) > 2 else 200):
    probes = [replica.probe(step, k, batch(step, k), epsilon=1e-3) for k in range(16)]
    replica.apply(zoray.commit(step, probes, learning_rate=1e-3))
    if step % 10 == 0:
        print(f"step {step}: loss {sum(probe.loss for probe in probes) / 16:.3f}")
model.save_pretrained("plain-model")
