"""Loads a reward model by its name on the hub and prints the sum of its value head: load_by_hub_name.py NAME"""

import sys

from utils.model.loading import find_checkpoint
from utils.model.model_utils import create_critic_model
from utils.model.tokenizer import load_hf_tokenizer

name = sys.argv[1]
model = create_critic_model(name, load_hf_tokenizer(name), rlhf_training=True)
assert (model.v_head.weight == find_checkpoint(name).value_head()).all()
print("head", model.v_head.weight.double().sum().item())
