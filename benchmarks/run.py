#!/usr/bin/env python
"""Time the training step of the small presets beside transformers' BERT of the same width and depth.

One thread, CPU time, the models taking turns, the median of `--repeats`: numbers of one run can be compared with each
other, not with those of another machine or moment.
"""

import argparse
import statistics
import time

import torch
from transformers import BertConfig, BertForMaskedLM

from mixlm import MixLMConfig, MixLMForMaskedLM, MixLMSwitchConfig, MixLMSwitchForMaskedLM

VOCABULARY = 8000


def bert_like(config: MixLMConfig) -> BertForMaskedLM:
    """BERT with the hidden size, layers and feed-forward width of `config`."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_heads,
            intermediate_size=config.ff_dim,
            max_position_embeddings=config.max_position_embeddings,
        )
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each model (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    mini = MixLMConfig.from_preset("mixlm-mini", vocab_size=VOCABULARY)
    switch = MixLMSwitchConfig.from_preset("mixlm-switch-mini", vocab_size=VOCABULARY)
    models = {
        "mixlm-mini": MixLMForMaskedLM(mini),
        "mixlm-switch-mini": MixLMSwitchForMaskedLM(switch),
        "bert of mini's size": bert_like(mini),
    }
    input_ids = torch.randint(5, VOCABULARY, (arguments.rows, arguments.length))
    labels = torch.where(torch.rand(input_ids.shape) < 0.15, input_ids, -100)
    optimizers = {name: torch.optim.AdamW(model.parameters(), fused=True) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(arguments.repeats + 1):
        for name, model in models.items():
            started = time.process_time()
            model(input_ids=input_ids, labels=labels).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if repeat:  # the first step warms up
                seconds[name].append(time.process_time() - started)

    tokens = arguments.rows * arguments.length
    print(f"training step, {arguments.rows} x {arguments.length} tokens, 1 thread, median of {arguments.repeats}")
    for name, times in seconds.items():
        parameters = sum(parameter.numel() for parameter in models[name].parameters())
        median = statistics.median(times)
        print(f"  {name:<22} {parameters / 1e6:6.1f}M parameters {median:8.3f} s {tokens / median:10,.0f} tokens/s")


if __name__ == "__main__":
    main()
