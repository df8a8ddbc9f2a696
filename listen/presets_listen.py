"""Named configurations: the models of the two papers, a small variant, and the miniatures."""

from typing import Any

_LLAMA3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "bos_token_id": 128000,
    "eos_token_id": 128009,
    "dtype": "bfloat16",
}
_WHISPER_LARGE_V2 = {
    "model_type": "whisper",
    "d_model": 1280,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "decoder_layers": 32,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "num_mel_bins": 80,
}
_WAV2VEC2_BERT = {
    "model_type": "wav2vec2-bert",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "feature_projection_input_dim": 160,
    "position_embeddings_type": "relative_key",
    "apply_spec_augment": False,
    "layerdrop": 0.0,
}
_KEY_LOSS = {"key_loss_type": "relative", "key_loss_weight": 1.0}  # moves the keys alone, no query and no connector
_LLAMA3_RESERVED = {"audio_token_id": 128002, "prompt_token_id": 128003}  # <|reserved_special_token_0|>, <|..._1|>


def _listen_llama3_8b() -> dict[str, Any]:
    """Whisper-large-v2, BEATs and Llama-3-8B with P=400 and K=160 (arXiv 2505.18517)."""
    return {
        "speech_config": dict(_WHISPER_LARGE_V2),
        "audio_config": {},
        "connector_config": {},
        "prompt_pool_config": {"pool_size": 400, "num_prompts": 160, **_KEY_LOSS},
        "text_config": dict(_LLAMA3_8B),
        **_LLAMA3_RESERVED,
    }


def _listen_0_4m() -> dict[str, Any]:
    """As `listen-llama3-8b` with a pool of 50 pairs, 0.41 M parameters, over a frozen connector."""
    pool = {"pool_size": 50, "num_prompts": 20, **_KEY_LOSS}
    return {**_listen_llama3_8b(), "prompt_pool_config": pool, "trainable": ["prompt_pool"]}


def _listen_tiny() -> dict[str, Any]:
    """The miniature of `model_cards/listen-tiny`, which runs on a laptop in seconds."""
    return {
        "speech_config": {
            "model_type": "whisper",
            "d_model": 128,
            "encoder_layers": 4,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 512,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 128,
            "num_mel_bins": 80,
        },
        "audio_config": {
            "hidden_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "patch_embed_dim": 128,
            "conv_pos": 32,
            "conv_pos_groups": 4,
            "num_buckets": 64,
            "max_distance": 256,
        },
        "connector_config": {"hidden_size": 192, "num_attention_heads": 4, "intermediate_size": 768},
        "prompt_pool_config": {
            "pool_size": 96,
            "num_prompts": 4,
            "query_source": "text",
            "center_query": True,
            "value_start": "vocabulary",
            **_KEY_LOSS,
        },
        "text_config": {
            "model_type": "llama",
            "vocab_size": 928,
            "hidden_size": 224,
            "intermediate_size": 640,
            "num_hidden_layers": 4,
            "num_attention_heads": 7,
            "num_key_value_heads": 7,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    }


def _speech_emotion_llama3_8b() -> dict[str, Any]:
    """SpeechEmotionLlama (arXiv 2410.01162): a Conformer and a connector, trained so that Llama-3-8B answers the voice.

    The paper's encoder, about 1 B parameters, is not public; in its place stands Wav2Vec2-BERT, of the same family and
    depth (`facebook/w2v-bert-2.0`), with frames of 20 ms where the paper has 40. Parameters: speech encoder
    580,493,120, of which 580,492,096 are trainable (the mask of SpecAugment, which is off, is not); connector
    100,286,464 (the paper: about 100 M); LLM 8,030,261,248, frozen. 680,778,560 are trainable in all.
    """
    return {
        "speech_config": dict(_WAV2VEC2_BERT),
        "connector_config": {
            "type": "conv_rotary",
            "hidden_size": 2560,
            "num_attention_heads": 20,
            "intermediate_size": 5888,
        },
        "text_config": dict(_LLAMA3_8B),
        "trainable": ["speech_encoder", "connector"],
        **_LLAMA3_RESERVED,
    }


def _speech_emotion_tiny() -> dict[str, Any]:
    """SpeechEmotionLlama in miniature: the speech encoder of `listen-tiny`, an embedding for each 0.32 s."""
    tiny = _listen_tiny()
    return {
        "speech_config": tiny["speech_config"],
        "connector_config": {
            "type": "conv_rotary",
            "embedding_seconds": 0.32,
            "hidden_size": 192,
            "num_attention_heads": 4,
            "intermediate_size": 768,
        },
        "text_config": {**tiny["text_config"], "vocab_size": 864},
        "trainable": ["speech_encoder", "connector"],
    }


PRESETS = {
    "listen-llama3-8b": _listen_llama3_8b,
    "listen-0.4m": _listen_0_4m,
    "listen-tiny": _listen_tiny,
    "speech-emotion-llama3-8b": _speech_emotion_llama3_8b,
    "speech-emotion-tiny": _speech_emotion_tiny,
}

__all__ = ["PRESETS"]
