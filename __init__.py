"""LiSTEN: a frozen text LLM that hears, through frozen encoders and a small learned adapter.

Importing the package registers its classes with the Auto classes and `pipeline("audio-llm")` of transformers.
"""

from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM

from .configuration_beats import BeatsConfig
from .configuration_listen import ListenConfig, ListenConnectorConfig, ListenPromptPoolConfig
from .modeling_beats import BeatsModel
from .modeling_listen import ListenForConditionalGeneration, ListenModel

__version__ = "0.1.0"

AutoConfig.register("listen", ListenConfig, exist_ok=True)
AutoConfig.register("beats", BeatsConfig, exist_ok=True)
AutoModel.register(BeatsConfig, BeatsModel, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    _auto_class.register(ListenConfig, ListenForConditionalGeneration, exist_ok=True)

__all__ = [
    "BeatsConfig",
    "BeatsModel",
    "ListenConfig",
    "ListenConnectorConfig",
    "ListenForConditionalGeneration",
    "ListenModel",
    "ListenPromptPoolConfig",
]
