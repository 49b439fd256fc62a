"""One table per architecture; `BUILTIN` lists the architectures that ship with the package."""

from .base import (
    ATTENDING,
    Architecture,
    Block,
    ConvArchitecture,
    LayerArchitecture,
    Place,
    TransformerArchitecture,
    part_at,
)
from .bert import (
    BertArchitecture,
    CamembertArchitecture,
    DebertaV2Architecture,
    DistilBertArchitecture,
    ElectraArchitecture,
    MPNetArchitecture,
    NomicBertArchitecture,
    RobertaArchitecture,
    XLMRobertaArchitecture,
)
from .block_weights import MAPS, LinearMap, linear_maps, reads_stream
from .bloom import BloomArchitecture
from .cohere import CohereArchitecture
from .conv_graph import ConvGraphArchitecture, Convolutions, Skip, Unit
from .falcon import FalconArchitecture
from .gemma import Gemma2Architecture, Gemma3Architecture, Gemma3TextArchitecture
from .glm4 import Glm4Architecture
from .gpt2 import GPT2Architecture, GPTNeoArchitecture
from .gpt_neox import GPTNeoXArchitecture
from .hybrid import MambaArchitecture, Qwen3NextArchitecture, Qwen35TextArchitecture
from .layouts import Heads
from .llama import (
    GraniteArchitecture,
    LlamaArchitecture,
    MistralArchitecture,
    MixtralArchitecture,
    Olmo2Architecture,
    Qwen2Architecture,
    Qwen3Architecture,
    Qwen3MoeArchitecture,
    SmolLM3Architecture,
    Starcoder2Architecture,
)
from .mobilenet_v2 import MobileNetV2Architecture
from .modernbert import ModernBertArchitecture
from .opt import BartArchitecture, MarianArchitecture, MBartArchitecture, OPTArchitecture, WhisperArchitecture
from .phi import Phi3Architecture, PhiArchitecture
from .placeholders import IdentityWithUnitGate, Placeholder, UnitGate, ZeroAttention, ZeroBlock
from .registry import ARCHITECTURES, FUSED_PREFIX, architecture_for, architecture_of, known_architectures
from .resnet import ResNetArchitecture
from .speech import HubertArchitecture, Wav2Vec2Architecture
from .t5 import T5Architecture
from .vit import (
    BEiTArchitecture,
    CLIPArchitecture,
    CLIPTextArchitecture,
    CLIPVisionArchitecture,
    DeiTArchitecture,
    DINOv2Architecture,
    DINOv3Architecture,
    SigLIPArchitecture,
    SigLIPTextArchitecture,
    SigLIPVisionArchitecture,
    ViTArchitecture,
    ViTMAEArchitecture,
)

BUILTIN: tuple[type[Architecture], ...] = (
    GPT2Architecture,
    BertArchitecture,
    RobertaArchitecture,
    DistilBertArchitecture,
    ViTArchitecture,
    DeiTArchitecture,
    LlamaArchitecture,
    MistralArchitecture,
    Qwen2Architecture,
    Qwen3Architecture,
    SmolLM3Architecture,
    GraniteArchitecture,
    Starcoder2Architecture,
    Olmo2Architecture,
    Gemma2Architecture,
    Gemma3TextArchitecture,
    Gemma3Architecture,
    FalconArchitecture,
    MixtralArchitecture,
    Qwen3MoeArchitecture,
    Qwen3NextArchitecture,
    Qwen35TextArchitecture,
    MambaArchitecture,
    GPTNeoArchitecture,
    OPTArchitecture,
    XLMRobertaArchitecture,
    CamembertArchitecture,
    ElectraArchitecture,
    MPNetArchitecture,
    DebertaV2Architecture,
    NomicBertArchitecture,
    ModernBertArchitecture,
    T5Architecture,
    BartArchitecture,
    MBartArchitecture,
    MarianArchitecture,
    WhisperArchitecture,
    Wav2Vec2Architecture,
    HubertArchitecture,
    CLIPArchitecture,
    CLIPVisionArchitecture,
    CLIPTextArchitecture,
    SigLIPArchitecture,
    SigLIPVisionArchitecture,
    SigLIPTextArchitecture,
    ViTMAEArchitecture,
    DINOv2Architecture,
    DINOv3Architecture,
    BEiTArchitecture,
    GPTNeoXArchitecture,
    BloomArchitecture,
    PhiArchitecture,
    Phi3Architecture,
    CohereArchitecture,
    Glm4Architecture,
    ResNetArchitecture,
    MobileNetV2Architecture,
)

__all__ = [
    "ARCHITECTURES",
    "ATTENDING",
    "BUILTIN",
    "FUSED_PREFIX",
    "MAPS",
    "Architecture",
    "Block",
    "ConvArchitecture",
    "ConvGraphArchitecture",
    "Convolutions",
    "Heads",
    "IdentityWithUnitGate",
    "LayerArchitecture",
    "LinearMap",
    "Place",
    "Placeholder",
    "Skip",
    "TransformerArchitecture",
    "Unit",
    "UnitGate",
    "ZeroAttention",
    "ZeroBlock",
    "architecture_for",
    "architecture_of",
    "known_architectures",
    "linear_maps",
    "part_at",
    "reads_stream",
]
