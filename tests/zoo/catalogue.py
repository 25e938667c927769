"""Models that others wrote: small for the tests, of their usual size for the table in docs/models.md.

Each factory imports its package itself, so that one that is missing skips its own models only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dropfx.bench.models import define_operators

Built = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Factory = Callable[[bool], Built]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model with the inputs of a training call.

    Attributes:
        title: as the table names it.
        package: what must be installed.
        build: (small) -> model, args, kwargs.
        left: pattern of site names -> word in the reason why these run as written; all others are rewritten.
        breaks: sites that run as written under torch.compile, whose own settings end a graph before them.
    """

    title: str
    package: str
    build: Factory
    left: dict[str, str]
    breaks: frozenset[str]

    def make(self, dtype: torch.dtype = torch.float32, small: bool = True) -> Built:
        define_operators()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, args, kwargs = self.build(small)
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: _cast(t, dtype), (args, kwargs))
        return model.to(dtype).train(), args, kwargs


ZOO: dict[str, Entry] = {}
SDPA = {"*:scaled_dot_product_attention*": "attention"}
OFF = "rate is 0"


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value


def entry(
    name: str, title: str, package: str, left: dict[str, str] | None = None, breaks: tuple[str, ...] = ()
) -> Callable[[Factory], Factory]:
    def add(build: Factory) -> Factory:
        ZOO[name] = Entry(title, package, build, left or {}, frozenset(breaks))
        return build

    return add


def ids(bound: int, *shape: int) -> Tensor:
    return torch.randint(bound, shape)


@entry("bert", "BERT base (`BertForMaskedLM`)", "transformers", left=SDPA)
def bert(small: bool) -> Built:
    from transformers import BertConfig, BertForMaskedLM

    tiny = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny |= {"intermediate_size": 128, "max_position_embeddings": 32}
    model = BertForMaskedLM(BertConfig(**(tiny if small else {})))
    tokens = ids(96, 3, 8) if small else ids(30000, 8, 128)
    return model, (), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


@entry("gpt2", "GPT-2 (`GPT2LMHeadModel`)", "transformers", left=SDPA)
def gpt2(small: bool) -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny = {"vocab_size": 96, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4}
    tiny |= {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(use_cache=False, **(tiny if small else {})))
    tokens = ids(96, 3, 8) if small else ids(50000, 4, 256)
    return model, (), {"input_ids": tokens, "labels": tokens}


@entry("t5", "T5 small (`T5ForConditionalGeneration`)", "transformers", left=SDPA)
def t5(small: bool) -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    tiny = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    model = T5ForConditionalGeneration(T5Config(use_cache=False, decoder_start_token_id=0, **(tiny if small else {})))
    tokens = ids(96, 3, 8) if small else ids(32000, 8, 128)
    return model, (), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}


@entry(
    "vit",
    "ViT base (`ViTForImageClassification`, dropout 0.1)",
    "transformers",
    left={**SDPA, "vit.embeddings.dropout": "no Linear"},
)
def vit(small: bool) -> Built:
    from transformers import ViTConfig, ViTForImageClassification

    tiny = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    tiny |= {"image_size": 16, "patch_size": 8}
    rates = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    model = ViTForImageClassification(ViTConfig(num_labels=10, **rates, **(tiny if small else {})))
    images = torch.randn(3, 3, 16, 16) if small else torch.randn(8, 3, 224, 224)
    return model, (images,), {"labels": ids(10, len(images))}


@entry("mixer", "MLP-Mixer B/16 (timm `MlpMixer`, dropout 0.1)", "timm")
def mixer(small: bool) -> Built:
    from timm.models.mlp_mixer import MlpMixer

    tiny = {"img_size": 32, "patch_size": 4, "num_blocks": 2, "embed_dim": 64}
    usual = {"img_size": 224, "patch_size": 16, "num_blocks": 12, "embed_dim": 768}
    model = MlpMixer(num_classes=10, proj_drop_rate=0.1, drop_rate=0.2, **(tiny if small else usual))
    return model, (torch.randn(3, 3, 32, 32) if small else torch.randn(8, 3, 224, 224),), {}


@entry("resmlp", "ResMLP S24 (timm, layer scale, dropout 0.1)", "timm", left={"head_drop": OFF})
def resmlp(small: bool) -> Built:
    from functools import partial

    from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock

    tiny = {"img_size": 32, "patch_size": 4, "num_blocks": 2, "embed_dim": 64}
    usual = {"img_size": 224, "patch_size": 16, "num_blocks": 24, "embed_dim": 384}
    block = partial(ResBlock, init_values=0.1)
    more = {"mlp_ratio": 4, "block_layer": block, "norm_layer": Affine, "proj_drop_rate": 0.1}
    model = MlpMixer(num_classes=10, **more, **(tiny if small else usual))
    return model, (torch.randn(3, 3, 32, 32) if small else torch.randn(8, 3, 224, 224),), {}


@entry(
    "cait",
    "CaiT XXS-24 (timm, layer scale, dropout 0.1)",
    "timm",
    left={"pos_drop": "no Linear", "*attn_drop": "units", "blocks_token_only*": OFF, "head_drop": OFF},
)
def cait(small: bool) -> Built:
    from timm.models.cait import Cait

    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    usual = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 24, "num_heads": 4}
    rates = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1, "init_values": 0.1}
    model = Cait(num_classes=10, **rates, **(tiny if small else usual))
    return model, (torch.randn(3, 3, 32, 32) if small else torch.randn(8, 3, 224, 224),), {}


@entry("timm_vit", "ViT S/16 (timm, dropout 0.1)", "timm", left={**SDPA, "pos_drop": "no Linear", "head_drop": OFF})
def timm_vit(small: bool) -> Built:
    from timm.models.vision_transformer import VisionTransformer

    tiny = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}
    usual = {"img_size": 224, "patch_size": 16, "embed_dim": 384, "depth": 12, "num_heads": 6}
    rates = {"proj_drop_rate": 0.1, "attn_drop_rate": 0.1, "pos_drop_rate": 0.1, "init_values": 0.1}
    model = VisionTransformer(num_classes=10, **rates, **(tiny if small else usual))
    return model, (torch.randn(3, 3, 32, 32) if small else torch.randn(8, 3, 224, 224),), {}


@entry("rtdl_mlp", "rtdl MLP (3 x 384)", "rtdl_revisiting_models")
def rtdl_mlp(small: bool) -> Built:
    from rtdl_revisiting_models import MLP

    model = MLP(d_in=16, d_out=1, n_blocks=2 if small else 3, d_block=64 if small else 384, dropout=0.3)
    return model, (torch.randn(5 if small else 512, 16),), {}


@entry("rtdl_resnet", "rtdl ResNet", "rtdl_revisiting_models", left={"*.dropout2": "statistics of a batch"})
def rtdl_resnet(small: bool) -> Built:
    from rtdl_revisiting_models import ResNet

    rates = {"dropout1": 0.25, "dropout2": 0.1, "d_hidden": None, "d_hidden_multiplier": 2.0}
    model = ResNet(d_in=16, d_out=1, n_blocks=2 if small else 4, d_block=64 if small else 256, **rates)
    return model, (torch.randn(5 if small else 512, 16),), {}


@entry("ft_transformer", "rtdl FT-Transformer", "rtdl_revisiting_models", left={"*.attention.dropout": "attention"})
def ft_transformer(small: bool) -> Built:
    from rtdl_revisiting_models import FTTransformer

    given = FTTransformer.get_default_kwargs()
    given |= {"n_blocks": 2, "d_block": 64, "residual_dropout": 0.1} if small else {"residual_dropout": 0.1}
    model = FTTransformer(n_cont_features=6, cat_cardinalities=[5, 7], d_out=1, **given)
    rows = 5 if small else 256
    return model, (torch.randn(rows, 6), torch.stack([ids(5, rows), ids(7, rows)], 1)), {}


@entry("vgg16", "VGG16 (torchvision)", "torchvision")
def vgg16(small: bool) -> Built:
    from torchvision.models import VGG, vgg16
    from torchvision.models.vgg import make_layers

    if not small:
        return vgg16(), (torch.randn(128, 3, 32, 32),), {}  # the pooling before the classifier hides the size
    model = VGG(make_layers([8, "M", 8, "M"]), num_classes=10)
    model.classifier[0], model.classifier[3] = nn.Linear(8 * 49, 128), nn.Linear(128, 128)
    model.classifier[6] = nn.Linear(128, 10)
    return model, (torch.randn(3, 3, 32, 32),), {}


@entry("alexnet", "AlexNet (torchvision)", "torchvision")
def alexnet(small: bool) -> Built:
    from torchvision.models import alexnet

    model = alexnet()
    if small:
        model.features = nn.Sequential(nn.Conv2d(3, 8, 5, 4), nn.ReLU(inplace=True))
        model.classifier[1], model.classifier[4] = nn.Linear(8 * 36, 128), nn.Linear(128, 128)
        model.classifier[6] = nn.Linear(128, 10)
    return model, (torch.randn(3, 3, 32, 32) if small else torch.randn(128, 3, 64, 64),), {}


@entry("pyg_mlp", "MLP (torch_geometric)", "torch_geometric", left={":dropout_3": OFF})
def pyg_mlp(small: bool) -> Built:
    from torch_geometric.nn import MLP

    width = 64 if small else 512
    return MLP([64, width, width, 8], dropout=0.5, norm=None), (torch.randn(5 if small else 1024, 64),), {}


@entry(
    "pyg_mlp_norm", "MLP (torch_geometric, with its default batch norm)", "torch_geometric", left={":dropout_3": OFF}
)
def pyg_mlp_norm(small: bool) -> Built:
    from torch_geometric.nn import MLP

    width = 64 if small else 512
    return MLP([64, width, width, 8], dropout=0.5), (torch.randn(5 if small else 1024, 64),), {}


@entry("pyg_gcn", "GCN (torch_geometric)", "torch_geometric", breaks=("dropout",))
def pyg_gcn(small: bool) -> Built:
    from torch_geometric.nn import GCN

    nodes = 12 if small else 2708
    width = 64 if small else 256
    return GCN(64, width, 2, 8, dropout=0.5), (torch.randn(nodes, 64), ids(nodes, 2, 4 * nodes)), {}
