"""Serve a LiSTEN model over HTTP, with the OpenAI API.

listen serve --model model_cards/listen-tiny --port 8000
listen serve --model my/checkpoint --adapter other=my/adapter --api-key KEY
listen serve --model my/checkpoint --engine vllm --engine-url http://localhost:8001 --dtype bfloat16
"""

from __future__ import annotations

import argparse
import os

import torch

from .. import ListenForConditionalGeneration, ListenPipeline, ListenProcessor
from ..data.extras import extra
from ..serving.app import Options, create_app
from ..serving.clips import ClipLimits
from ..serving.encoders import EncoderSide, drop_layers
from ..serving.engine import Engine
from ..serving.in_process import TransformersEngine
from ..serving.vllm import VllmEngine, VllmServer
from .help import DTYPES, ArgumentFormatter

with extra("serve"):
    import uvicorn

KEY_VARIABLE = "LISTEN_API_KEY"
ENGINE_KEY = "LISTEN_ENGINE_KEY"


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ArgumentFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a LiSTEN model")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=DIR", help="one more adapter; repeat")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers", help="what runs the LLM")
    parser.add_argument("--engine-url", help="address of the vLLM server, which runs the bare LLM")
    parser.add_argument("--engine-key", default=os.environ.get(ENGINE_KEY), help=f"its key; default: {ENGINE_KEY}")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of the backbones")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 for all interfaces")
    parser.add_argument("--port", type=int, default=8000, help="port")
    parser.add_argument("--api-key", default=os.environ.get(KEY_VARIABLE), help=f"default: the variable {KEY_VARIABLE}")
    parser.add_argument("--max-batch", type=int, default=16, help="requests in one batch")
    parser.add_argument("--max-waiting", type=int, default=256, help="requests that may wait; 429 beyond")
    parser.add_argument("--max-body-mb", type=float, default=25.0, help="size of a request in MiB")
    parser.add_argument("--max-audio-seconds", type=float, default=600.0, help="length of all clips of a request")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds until an answer must be complete")
    parser.add_argument("--allow-private-urls", action="store_true", help="fetch audio from inside the own network too")
    return parser.parse_args()


def load_engine(arguments: argparse.Namespace) -> Engine:
    """The engine with the model and all adapters.

    Raises:
        ValueError: an adapter that cannot be read, an engine and its address that do not fit, or an unusable device.
    """
    try:
        torch.empty(0, device=arguments.device)
    except (RuntimeError, AssertionError) as error:  # the latter where torch was built without CUDA
        raise ValueError(f"--device={arguments.device} cannot be used: {str(error).splitlines()[0]}") from error
    if (arguments.engine == "vllm") != bool(arguments.engine_url):
        raise ValueError("--engine vllm and --engine-url go together; give both, or neither")
    model_class = EncoderSide if arguments.engine == "vllm" else ListenForConditionalGeneration
    model = model_class.from_pretrained(arguments.model, dtype=arguments.dtype)
    for given in arguments.adapter:
        name, is_pair, folder = given.partition("=")
        if not (is_pair and name and folder):
            raise ValueError(f"--adapter {given!r} must be NAME=DIR")
        model.load_adapter(folder, name)
    if arguments.engine == "vllm":
        drop_layers(model)  # before the model is moved to its device
    processor = ListenProcessor.from_pretrained(arguments.model)
    pipeline = ListenPipeline(model=model, processor=processor, device=arguments.device)
    limits = {"max_batch": arguments.max_batch, "max_waiting": arguments.max_waiting}
    if arguments.engine == "vllm":
        server = VllmServer(arguments.engine_url, arguments.engine_key, arguments.timeout)
        return VllmEngine(pipeline, arguments.model, server, **limits)
    return TransformersEngine(pipeline, arguments.model, **limits)


def main() -> None:
    """Serve until SIGINT or SIGTERM; requests that are under way are answered first."""
    arguments = parse_arguments()
    size = int(arguments.max_body_mb * 2**20)
    clip = ClipLimits(arguments.max_audio_seconds, size, arguments.allow_private_urls)
    app = create_app(load_engine(arguments), Options(arguments.api_key, size, clip, arguments.timeout))
    uvicorn.run(app, host=arguments.host, port=arguments.port, timeout_graceful_shutdown=int(arguments.timeout) + 1)
