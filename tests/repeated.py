"""A small Transformer that has no architecture table, and whose layers run in one of several orders."""

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class RepeatedConfig(PreTrainedConfig):
    model_type = "repeated"
    vocab_size: int = 64
    hidden_size: int = 16
    num_hidden_layers: int = 6
    num_attention_heads: int = 1
    order: str = "once"
    side: int = 0


class _Attention(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, hidden):
        return self.out(nn.functional.scaled_dot_product_attention(*self.qkv(hidden).chunk(3, dim=-1)))


class _Layer(nn.Module):
    def __init__(self, size, parallel):
        super().__init__()
        self.parallel = parallel
        self.norm1, self.attention = nn.LayerNorm(size), _Attention(size)
        self.norm2, self.mlp = nn.LayerNorm(size), nn.Sequential(nn.Linear(size, 32), nn.GELU(), nn.Linear(32, size))

    def forward(self, hidden):
        if self.parallel:
            return hidden + self.attention(self.norm1(hidden)) + self.mlp(self.norm2(hidden))
        hidden = hidden + self.attention(self.norm1(hidden))
        return hidden + self.mlp(self.norm2(hidden))


class RepeatedForSequenceClassification(PreTrainedModel):
    """A model without a table, whose layers run in one of several orders."""

    config_class = RepeatedConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            _Layer(config.hidden_size, config.order == "mixed" and i > 3) for i in range(config.num_hidden_layers)
        )
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(self, input_ids, side=None):
        if self.config.side and side is None:
            raise ValueError("side is missing")
        hidden, order = self.embed(input_ids), self.config.order
        for _ in range(2 if order == "twice" else 1):
            for layer in reversed(self.layers) if order == "backwards" else self.layers:
                hidden = layer(hidden)
        return SequenceClassifierOutput(logits=self.classifier(hidden.mean(1)))


AutoConfig.register("repeated", RepeatedConfig)
AutoModelForSequenceClassification.register(RepeatedConfig, RepeatedForSequenceClassification)


def repeated(**fields) -> RepeatedForSequenceClassification:
    torch.manual_seed(0)
    model = RepeatedForSequenceClassification(RepeatedConfig(**fields)).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn(parameter.shape)
    return model


def tokens(rows: int = 8) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.randint(64, (rows, 12), generator=torch.Generator().manual_seed(0))}
