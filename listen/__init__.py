"""LiSTEN: a frozen text LLM with audio input, through frozen encoders and a small trained adapter.

Importing the package registers its classes with the Auto classes and `pipeline("audio-llm")` of transformers.
"""

from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_audio_classification import ListenAudioClassificationConfig
from .configuration_beats import BeatsConfig
from .configuration_listen import ListenConfig, ListenConnectorConfig, ListenPromptPoolConfig
from .feature_extraction_audio_classification import ListenAudioClassificationFeatureExtractor
from .feature_extraction_listen import ListenFeatureExtractor
from .modeling_audio_classification import ListenForAudioClassification
from .modeling_beats import BeatsForAudioClassification, BeatsModel
from .modeling_listen import ListenForConditionalGeneration, ListenModel
from .pipeline_listen import ListenPipeline
from .processing_listen import ListenProcessor

__version__ = "0.1.0"

AutoConfig.register("listen", ListenConfig, exist_ok=True)
AutoConfig.register("beats", BeatsConfig, exist_ok=True)
AutoConfig.register("listen_audio_classification", ListenAudioClassificationConfig, exist_ok=True)
AutoModel.register(BeatsConfig, BeatsModel, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForMultimodalLM):
    _auto_class.register(ListenConfig, ListenForConditionalGeneration, exist_ok=True)
AutoModelForAudioClassification.register(BeatsConfig, BeatsForAudioClassification, exist_ok=True)
AutoModelForAudioClassification.register(ListenAudioClassificationConfig, ListenForAudioClassification, exist_ok=True)
AutoFeatureExtractor.register(ListenAudioClassificationConfig, ListenAudioClassificationFeatureExtractor, exist_ok=True)
AutoFeatureExtractor.register(ListenConfig, ListenFeatureExtractor, exist_ok=True)
AutoProcessor.register(ListenConfig, ListenProcessor, exist_ok=True)
# `transformers serve` and AnyToAnyPipeline look classes up in this table of names, which the Auto classes do not extend
MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES["listen"] = ListenForConditionalGeneration.__name__
PIPELINE_REGISTRY.register_pipeline("audio-llm", pipeline_class=ListenPipeline, pt_model=AutoModel, type="multimodal")

__all__ = [
    "BeatsConfig",
    "BeatsForAudioClassification",
    "BeatsModel",
    "ListenAudioClassificationConfig",
    "ListenAudioClassificationFeatureExtractor",
    "ListenConfig",
    "ListenConnectorConfig",
    "ListenFeatureExtractor",
    "ListenForAudioClassification",
    "ListenForConditionalGeneration",
    "ListenModel",
    "ListenPipeline",
    "ListenProcessor",
    "ListenPromptPoolConfig",
]
