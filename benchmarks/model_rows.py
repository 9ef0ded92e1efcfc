"""Rows of whole models and of their parts: MixLM and Switch against the older formulation and against transformers'.

The competitors of a row share batch, precision, dropout and one thread. Peers have the hidden size and the layers of
mixlm-base, their own shape in all else (feed-forward of 4 x hidden, heads of width 64), and in a training step the
heads of mixlm, so that encoders are compared.
"""

import copy
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measure import Result, Row, gemm_peak, interleaved, median_ratio, medians, peak_memory
from older import OlderForPreTraining
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertModel,
    ConvBertConfig,
    ConvBertModel,
    ModernBertConfig,
    ModernBertModel,
    SwitchTransformersConfig,
    SwitchTransformersEncoderModel,
)

from mixlm import MixLMConfig, MixLMForMaskedLM, MixLMForPreTraining, MixLMSwitchConfig, MixLMSwitchForPreTraining
from mixlm.errors import UserError
from mixlm.heads import IGNORE, MaskedLMHead, PreTrainingOutput, SentenceOrderHead, masked_lm_loss
from mixlm.kernels import Kernels
from mixlm.modeling_switch import SwitchFeedForward, within_capacity
from mixlm.profiling import EncoderForward, Step, TrainingStep, count_operations, random_batch, run

VOCABULARY = 35_000
HIDDEN, LAYERS = 512, 12
COMPILED_LAYERS = 3  # compiling takes minutes, and longer with every layer
PAIRS = 5
PEERS = {
    "bert": (
        BertModel,
        BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HIDDEN // 64,
            intermediate_size=4 * HIDDEN,
            attn_implementation="sdpa",
        ),
    ),
    "albert": (
        AlbertModel,
        AlbertConfig(
            vocab_size=VOCABULARY,
            embedding_size=128,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HIDDEN // 64,
            intermediate_size=4 * HIDDEN,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
            attn_implementation="sdpa",
        ),
    ),
    "convbert": (
        ConvBertModel,
        ConvBertConfig(
            vocab_size=VOCABULARY,
            embedding_size=HIDDEN,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HIDDEN // 64,
            intermediate_size=4 * HIDDEN,
        ),
    ),
    "modernbert": (
        ModernBertModel,
        ModernBertConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HIDDEN // 64,
            intermediate_size=2 * HIDDEN,  # it is gated: two such matrices go in
            attention_dropout=0.1,
            mlp_dropout=0.1,
            embedding_dropout=0.1,
            attn_implementation="sdpa",
            pad_token_id=0,
            bos_token_id=2,
            eos_token_id=3,
            cls_token_id=2,
            sep_token_id=3,
        ),
    ),
    "switch_transformers": (
        SwitchTransformersEncoderModel,
        SwitchTransformersConfig(
            vocab_size=VOCABULARY,
            d_model=HIDDEN,
            d_kv=64,
            num_heads=HIDDEN // 64,
            d_ff=4 * HIDDEN,
            num_layers=LAYERS,
            num_sparse_encoder_layers=LAYERS,
            num_experts=4,
            expert_capacity=1024,
        ),
    ),
}


class PeerForPreTraining(nn.Module):
    """A peer's encoder under the heads of mixlm: MLM at labelled tokens, and sentence order."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        config = MixLMConfig(vocab_size=VOCABULARY, hidden_size=HIDDEN)
        self.encoder, self.mlm_head, self.sop_head = encoder, MaskedLMHead(config), SentenceOrderHead(config)
        embeddings = encoder.get_input_embeddings()
        if embeddings.weight.shape == self.mlm_head.decoder.weight.shape:
            self.mlm_head.decoder.weight = embeddings.weight

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, sentence_order_label: Tensor
    ) -> PreTrainingOutput:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        labelled = labels != IGNORE
        mlm_loss = masked_lm_loss(self.mlm_head(hidden[labelled]), labels[labelled])
        return PreTrainingOutput(loss=mlm_loss + F.cross_entropy(self.sop_head(hidden), sentence_order_label))


def peer(name: str) -> PeerForPreTraining:
    """A peer with new weights."""
    model_class, config = PEERS[name]
    return PeerForPreTraining(model_class(copy.deepcopy(config)))


def base_model(length: int = 512, **fields) -> MixLMForPreTraining:
    """mixlm-base with new weights."""
    torch.manual_seed(0)
    return MixLMForPreTraining(
        MixLMConfig.from_preset(
            "mixlm-base", vocab_size=VOCABULARY, max_position_embeddings=max(length, 512), **fields
        )
    )


def padded_batch(rows: int, length: int) -> dict[str, Tensor]:
    """The same random texts each time, the last a quarter padding, without token types: not every competitor has them.

    Padding is there because some attention does without its mask where nothing is padded.
    """
    torch.manual_seed(0)
    batch = random_batch(MixLMConfig(vocab_size=VOCABULARY), rows, length)
    del batch["token_type_ids"]
    batch["attention_mask"][-1, -length // 4 :] = 0
    batch["labels"][-1, -length // 4 :] = IGNORE
    return batch


def encoder_forward() -> list[Result]:
    """Encoder forward pass, mixlm-base: times faster than the older formulation"""
    torch.set_num_threads(1)
    batch = padded_batch(8, 128)
    model = base_model()
    encoders = {"older": OlderForPreTraining(copy.deepcopy(model)).encoder, "mixlm": model.encoder}
    encoders |= {name: peer(name).encoder for name in PEERS}
    steps = {name: partial(run, EncoderForward(encoder, batch)) for name, encoder in encoders.items()}
    seconds = interleaved(steps, PAIRS + 2)
    return [
        Result(
            "encoder_forward_8x128" if name == "older" else f"encoder_forward_vs_{name}",
            median_ratio(taken, seconds["mixlm"]),
            "x",
            ">= 1.8" if name == "older" else "",
            f"{LAYERS} layers, 8 x 128",
            1,
            PAIRS + 2,
        )
        for name, taken in seconds.items()
        if name != "mixlm"
    ]


def train_step() -> list[Result]:
    """Training step (forward, backward, AdamW; MLM + SOP), mixlm-base: times faster than the older formulation"""
    return [_against_older("train_step_8x128", ">= 2.3", 8, 128)]


def long_train_step() -> list[Result]:
    """Training step of long texts, mixlm-base: times faster than the older formulation"""
    return [_against_older("train_step_2x512", ">= 2.4", 2, 512)]


def _against_older(name: str, target: str, rows: int, length: int) -> Result:
    torch.set_num_threads(1)
    batch = padded_batch(rows, length)
    model = base_model()
    older = TrainingStep(OlderForPreTraining(copy.deepcopy(model)), batch)
    older.optimizer = torch.optim.AdamW(older.model.parameters(), lr=1e-4)  # that of the older scripts
    steps = {"older": older, "mixlm": TrainingStep(model, batch)}
    seconds = interleaved({name: partial(run, step) for name, step in steps.items()}, PAIRS)
    ratio = median_ratio(seconds["older"], seconds["mixlm"])
    return Result(name, ratio, "x", target, f"{LAYERS} layers, {rows} x {length}", 1, PAIRS)


def train_step_of_peers() -> list[Result]:
    """Training step, equal hidden size, layers and heads"""
    torch.set_num_threads(1)
    batch = padded_batch(8, 128)
    models = {"mixlm": base_model(), **{name: peer(name) for name in PEERS}}
    steps = {name: partial(run, TrainingStep(model, batch)) for name, model in models.items()}
    seconds = interleaved(steps, PAIRS)
    # In the plain form, which computes nothing twice: what is done again is no work done.
    counted = {"mixlm": base_model(kernels="plain").train(), "bert": models["bert"]}
    operations = {
        name: count_operations(lambda model=model: model(**batch).loss.backward()) for name, model in counted.items()
    }
    rates = {name: operations[name] / medians(seconds)[name] for name in operations}
    shape, targets = f"{LAYERS} layers, 8 x 128", {"bert": ">= 1.0"}
    return [
        *(
            Result(
                f"train_step_vs_{name}",
                median_ratio(seconds[name], seconds["mixlm"]),
                "x",
                targets.get(name, ""),
                shape,
                1,
                PAIRS,
            )
            for name in PEERS
        ),
        Result("train_step_flop_rate_vs_bert", rates["mixlm"] / rates["bert"], "x", ">= 1.1", shape, 1, PAIRS),
        Result("train_step_flop_rate", rates["mixlm"] / gemm_peak(), "of peak", "", shape, 1, PAIRS),
    ]


def train_step_compiled() -> list[Result]:
    """Training step: times faster by torch.compile (inductor) than uncompiled with the default kernels"""
    return [_against_uncompiled("train_step_compiled", TrainingStep)]


def encoder_forward_compiled() -> list[Result]:
    """Encoder forward pass: times faster by torch.compile (inductor) than uncompiled with the default kernels"""
    return [_against_uncompiled("encoder_forward_compiled", EncoderForward)]


def _against_uncompiled(name: str, step_class: type[Step]) -> Result:
    require_compiler()
    torch.set_num_threads(1)
    batch = padded_batch(8, 128)
    model, compiled = (base_model(num_hidden_layers=COMPILED_LAYERS) for _ in range(2))
    if step_class is EncoderForward:
        model, compiled = model.encoder, compiled.encoder
    steps = {
        "uncompiled": step_class(model, batch),
        "compiled": step_class(torch.compile(compiled, fullgraph=True), batch),
    }
    # With a new cache all is compiled now, whatever earlier runs left.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        started = time.perf_counter()
        run(steps["compiled"])
        compilation = time.perf_counter() - started
        seconds = interleaved({name: partial(run, step) for name, step in steps.items()}, PAIRS)
    shape = f"mixlm-base with {COMPILED_LAYERS} layers, 8 x 128; compiled in {compilation:.0f} s"
    return Result(name, median_ratio(seconds["uncompiled"], seconds["compiled"]), "x", "", shape, 1, PAIRS)


def require_compiler() -> None:
    """Raise UserError where inductor has no C++ compiler."""
    compiler = os.environ.get("CXX", "g++")
    if not shutil.which(compiler):
        raise UserError(f"{compiler}: no such C++ compiler, which torch.compile needs; install one, such as g++")


def prepare_backward(kernels: str, rows: int, length: int) -> Callable[[], object]:
    """Forward and backward of mixlm-base; `kernels` "older" is the older formulation."""
    model = base_model(length, **({} if kernels == "older" else {"kernels": kernels})).train()
    if kernels == "older":
        model = OlderForPreTraining(model).train()
    batch = padded_batch(rows, length)
    return lambda: model(**batch).loss.backward()


def train_memory() -> list[Result]:
    """Peak memory of forward and backward above the idle model, mixlm-base: share of the older formulation's"""
    rows, length = 1, 2048
    peaks = {
        kernels: peak_memory("model_rows:prepare_backward", kernels=kernels, rows=rows, length=length)
        for kernels in ("older", "auto", "fused", "plain")
    }
    shape = f"12 layers, {rows} x {length}"
    return [
        Result("train_memory_1x2048", peaks["auto"] / peaks["older"], "x", "<= 0.32", shape, 1, 1),
        Result("train_memory_1x2048_fused", peaks["fused"] / peaks["older"], "x", "", shape, 1, 1),
        Result("train_memory_1x2048_plain", peaks["plain"] / peaks["older"], "x", "", shape, 1, 1),
    ]


class ExpertLoop(nn.Module):
    """The experts of a `SwitchFeedForward` as modules of their own, one after the other over the tokens they get."""

    def __init__(self, feed_forward: SwitchFeedForward):
        super().__init__()
        given = feed_forward.experts
        experts, width, hidden = given.up_weight.shape
        self.act_fn = given.act_fn
        self.up = nn.ModuleList(nn.Linear(hidden, width) for _ in range(experts))
        self.down = nn.ModuleList(nn.Linear(width, hidden) for _ in range(experts))

    def forward(self, tokens: Tensor, expert: Tensor) -> Tensor:
        output = torch.zeros_like(tokens)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            chosen = expert == number
            output[chosen] = down(self.act_fn(up(tokens[chosen])))
        return output


class LoopFeedForward(nn.Module):
    """A `SwitchFeedForward` whose experts are a loop: every expert looks for its tokens among all."""

    def __init__(self, feed_forward: SwitchFeedForward):
        super().__init__()
        self.config, self.router, self.dropout = feed_forward.config, feed_forward.router, nn.Dropout(0.1)
        self.experts = ExpertLoop(feed_forward)

    def forward(self, hidden: Tensor, token_mask: None, kernels: Kernels) -> tuple[Tensor, Tensor]:
        router_logits = self.router(hidden)
        probability, expert = router_logits.softmax(dim=-1).max(dim=-1)
        real = torch.ones_like(expert, dtype=torch.bool)
        routed = within_capacity(expert, real, self.config.n_experts, self.config.capacity_factor)
        transformed = torch.zeros_like(hidden)
        transformed[routed] = self.experts(hidden[routed], expert[routed]) * probability[routed, None]
        return self.dropout(transformed), router_logits


def switch_feed_forward(rows: int, targets: dict[str, str]) -> list[Result]:
    """Switch feed-forward, forward and backward, of `rows` texts.

    Args:
        rows: of 128 tokens.
        targets: by the names of the results: that against the loop, and that of 32 experts over 4.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden = torch.randn(rows, 128, HIDDEN, requires_grad=True)
    gradient = torch.randn_like(hidden)
    kernels = Kernels(fused=True, recompute=False)

    def work(feed_forward: SwitchFeedForward) -> Callable[[], None]:
        def step() -> None:
            feed_forward(hidden, None, kernels)[0].backward(gradient)
            feed_forward.zero_grad()

        return step

    models = {}
    for experts in (4, 32):
        config = MixLMSwitchConfig.from_preset("mixlm-switch-base", n_experts=experts, num_hidden_layers=3)
        feed_forward = MixLMSwitchForPreTraining(config).encoder.stack.feed_forwards[0].train()
        models[f"{experts} experts"] = feed_forward
        if experts == 4:
            models["loop"] = LoopFeedForward(copy.deepcopy(feed_forward)).train()
    pairs = 11
    seconds = interleaved({name: work(model) for name, model in models.items()}, pairs)
    few = seconds["4 experts"]
    ratios = median_ratio(seconds["loop"], few), median_ratio(seconds["32 experts"], few)
    shape = f"{rows} x 128 tokens, 512 -> 2048"
    return [
        Result(name, ratio, "x", target, shape, 1, pairs)
        for (name, target), ratio in zip(targets.items(), ratios, strict=True)
    ]


def prepare_mlm_head(all_positions: bool, rows: int, length: int) -> Callable[[], object]:
    """Forward and backward of the MLM head over a given hidden state."""
    torch.manual_seed(0)
    model = MixLMForMaskedLM(MixLMConfig.from_preset("mixlm-base", vocab_size=VOCABULARY, num_hidden_layers=3))
    hidden = torch.randn(rows, length, HIDDEN, requires_grad=True)
    labels = padded_batch(rows, length)["labels"]

    def work() -> None:
        if all_positions:
            logits = model.mlm_head(hidden)
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        else:
            loss = masked_lm_loss(*model.predict_tokens(hidden, labels))
        loss.backward()
        model.zero_grad()

    return work


def mlm_head() -> list[Result]:
    """MLM head at labelled tokens against all positions, forward and backward"""
    torch.set_num_threads(1)
    rows, length, pairs = 32, 128, 5
    heads = {name: prepare_mlm_head(name == "all", rows, length) for name in ("all", "labelled")}
    seconds = interleaved(heads, pairs)
    peaks = {
        name: peak_memory("model_rows:prepare_mlm_head", all_positions=name == "all", rows=rows, length=length)
        for name in heads
    }
    shape = f"{rows} x {length} tokens, 15% labelled, vocabulary {VOCABULARY:,}"
    ratio = median_ratio(seconds["all"], seconds["labelled"])
    return [
        Result("mlm_head_time", ratio, "x", ">= 5.5", shape, 1, pairs),
        Result("mlm_head_memory", peaks["labelled"] / peaks["all"], "x", "<= 0.15", shape, 1, 1),
    ]


ROWS = [
    Row(
        ("encoder_forward_8x128", *(f"encoder_forward_vs_{name}" for name in PEERS)),
        encoder_forward,
        {
            f"encoder_forward_vs_{name}": f"Encoder forward pass: times faster than transformers' {name}"
            for name in PEERS
        },
    ),
    Row(("train_step_8x128",), train_step),
    Row(("train_step_2x512",), long_train_step),
    Row(
        ("train_memory_1x2048", "train_memory_1x2048_fused", "train_memory_1x2048_plain"),
        train_memory,
        {
            "train_memory_1x2048_fused": 'The same with kernels="fused" ("auto" is "lean" at this length)',
            "train_memory_1x2048_plain": 'The same with kernels="plain"',
        },
    ),
    Row(
        (
            *(f"train_step_vs_{name}" for name in PEERS),
            "train_step_flop_rate_vs_bert",
            "train_step_flop_rate",
        ),
        train_step_of_peers,
        {
            **{f"train_step_vs_{name}": f"Training step: times faster than transformers' {name}" for name in PEERS},
            "train_step_flop_rate_vs_bert": "Operations a second in a training step: times those of bert",
            "train_step_flop_rate": "Operations a second in a training step, as a share of the GEMM peak",
        },
    ),
    Row(("encoder_forward_compiled",), encoder_forward_compiled),
    Row(("train_step_compiled",), train_step_compiled),
    Row(
        ("switch_ffn_4_experts", "switch_ffn_32_over_4"),
        partial(switch_feed_forward, 32, {"switch_ffn_4_experts": ">= 1.15", "switch_ffn_32_over_4": "<= 1.3"}),
        {
            "switch_ffn_4_experts": "Switch feed-forward, forward + backward: times faster than a loop over 4 experts",
            "switch_ffn_32_over_4": "Switch feed-forward, forward + backward: time of 32 experts over that of 4",
        },
    ),
    Row(
        ("switch_ffn_4_experts_8x128", "switch_ffn_32_over_4_8x128"),
        partial(switch_feed_forward, 8, {"switch_ffn_4_experts_8x128": "", "switch_ffn_32_over_4_8x128": ""}),
        {
            "switch_ffn_4_experts_8x128": "The same with fewer tokens: times faster than a loop over 4 experts",
            "switch_ffn_32_over_4_8x128": "The same with fewer tokens: time of 32 experts over that of 4",
        },
    ),
    Row(
        ("mlm_head_time", "mlm_head_memory"),
        mlm_head,
        {
            "mlm_head_time": "MLM head at labelled tokens, forward + backward: times faster than at all positions",
            "mlm_head_memory": "MLM head at labelled tokens, forward + backward: share of all positions' peak memory",
        },
    ),
]
