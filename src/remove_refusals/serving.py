"""Transformers' own OpenAI-compatible server, answering with one loaded model from which directions are taken out.

Every answer comes from the model that is handed over, so what hooks do to it they do to every answer. Nothing is
loaded on request: a request that names another model is refused.
"""

import importlib.metadata
import importlib.util
import inspect
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from remove_refusals.apply.hooks import ablated
from remove_refusals.batching import contiguous_head
from remove_refusals.errors import ModelError
from remove_refusals.loading import quiet
from remove_refusals.map_types import ModelMap
from remove_refusals.models import LoadedModel
from remove_refusals.types import Intervention

LOOPBACK = "127.0.0.1"
PORT = 8000

_PACKAGES = ("fastapi", "openai", "uvicorn")
_PARTS = {"model_manager", "chat_handler", "completion_handler", "response_handler", "generation_state"}
_LEFT_OUT = {"transcription_handler", "systemone_handler"}


def check_installed() -> None:
    """Check that Transformers' server is there, in a form that is known.

    Raises:
        ModelError: If a package that it needs is not installed, or the installed Transformers has none or another one.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise ModelError(
                f"The command serve found no package {package}, expected it to be installed; run "
                "`pip install 'remove-refusals[serve]'`."
            )
    try:
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.serving.server import build_server
    except ImportError:
        known = False
    else:
        known = is_known_form(build_server) and hasattr(ModelManager, "process_model_name")
    if not known:
        version = importlib.metadata.version("transformers")
        raise ModelError(
            f"Transformers {version} has no server of a known form, expected that of 5.20 or a little later; run "
            "`pip install 'remove-refusals[serve]'`, or bake the edit and serve the files."
        )


def is_known_form(build_server: Callable[..., Any]) -> bool:
    """Say whether a function that builds Transformers' server takes the parts that it is given here, and no other."""
    return set(inspect.signature(build_server).parameters) - {"enable_cors"} == _PARTS | _LEFT_OUT


@contextmanager
def reserved(host: str = LOOPBACK, port: int = PORT) -> Iterator[socket.socket]:
    """Reserve an address as long as the context lasts; nobody is answered there before the server runs.

    Args:
        host: The address to listen on; by default this machine alone can reach it.
        port: The port; 0 for a free one.

    Yields:
        The bound socket.

    Raises:
        ModelError: If the address is taken or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ModelError(
                f"The address {host}, port {port} cannot be listened on ({error.strerror}), expected a free one of "
                "this machine; pass another --port or --host."
            ) from error
        yield listener


def serve(
    loaded: LoadedModel,
    intervention: Intervention,
    listener: socket.socket,
    *,
    name: str | None = None,
    model_map: ModelMap | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Answer requests until Ctrl-C or SIGTERM; answers that are under way then are broken off.

    Args:
        loaded: The model; nothing else may run it meanwhile. Afterwards it is as it was.
        intervention: What is taken out of every answer.
        listener: A socket of `reserved`.
        name: What requests call the model; by default where it was loaded from.
        model_map: The model's map, if it is at hand.
        on_ready: Called with the server's address as soon as requests are taken.

    Raises:
        ModelError: If Transformers' server is not there, or the tokenizer is not one that it can stream with.
        DirectionError: If the intervention does not fit the model.
        ArchitectureError: If no hook reaches what is to be taken out.
    """
    check_installed()
    import uvicorn

    if not loaded.tokenizer.is_fast:
        raise ModelError(
            f"The tokenizer of {loaded.source} is {type(loaded.tokenizer).__name__}, which runs in Python, expected "
            "one of the package tokenizers, with which Transformers' server streams; save it in that form."
        )
    settings = uvicorn.Config(build_app(loaded, name or loaded.source), log_level="warning")
    server = uvicorn.Server(settings)
    edit = ablated(loaded.model, intervention, model_map=model_map)
    with quiet(bars=False), edit, contiguous_head(loaded), _ending(server, loaded.model):
        # From here on requests wait, instead of being turned away, until the server takes them.
        listener.listen()
        if on_ready is not None:
            host, port = listener.getsockname()[:2]
            on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}/v1")
        server.run(sockets=[listener])


def build_app(loaded: LoadedModel, name: str) -> Any:
    """Build Transformers' server around one model.

    Args:
        loaded: The model.
        name: What requests call it.

    Returns:
        A FastAPI application: chat completions, completions, responses, and the list of models, which is this one.
        Speech and typed decisions, which ask for models of other kinds, are refused.
    """
    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState

    class Refusing:
        """Stands in for what this server does not do."""

        async def handle_request(self, *_: Any) -> Any:
            raise HTTPException(404, "Not served here; chat completions, completions and responses are.")

    manager, state = _one_model(loaded, name), GenerationState()
    return build_server(
        manager,
        ChatCompletionHandler(manager, state),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state),
        transcription_handler=Refusing(),
        systemone_handler=Refusing(),
        generation_state=state,
    )


def _one_model(loaded: LoadedModel, name: str) -> Any:
    """Give a model manager that has one model and loads none."""
    from fastapi import HTTPException
    from transformers.cli.serving.model_manager import ModelManager

    class OneModel(ModelManager):  # type: ignore[misc]
        """Knows one model. Whichever way a request takes, it asks for the model here."""

        def process_model_name(self, model_id: str, gguf_file: str | None = None) -> str:
            asked = model_id if gguf_file is None else f"{model_id}:{gguf_file}"
            if asked != name:
                raise HTTPException(400, f"This server has the model {name!r} alone, and {asked!r} was asked for.")
            return name

        def load_model_and_processor(
            self,
            model_id_and_revision: str,
            progress_callback: Any = None,
            tqdm_class: Any = None,
            gguf_file: str | None = None,
        ) -> tuple[Any, Any]:
            self.process_model_name(model_id_and_revision, gguf_file)
            if progress_callback is not None:
                progress_callback({"status": "ready", "model": name, "cached": True})
            return loaded.model, loaded.tokenizer

        def load_model_streaming(self, model_id_and_revision: str, gguf_file: str | None = None) -> Any:
            # Checked here too: once the stream has begun it is too late to refuse the request.
            self.process_model_name(model_id_and_revision, gguf_file)
            return super().load_model_streaming(model_id_and_revision)

        def list_models(self, *_: Any) -> list[dict[str, Any]]:
            one = {"id": name, "object": "model", "created": 0, "owned_by": "local", "status": {"value": "loaded"}}
            return [one]

        # Its name before Transformers 5.24.
        get_gen_models = list_models

    manager = OneModel()
    # With this set, Transformers compares the name in each request with it.
    manager.force_model = name
    return manager


@contextmanager
def _ending(server: Any, model: torch.nn.Module) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the server and the answer under way, and nothing else, while the context lasts."""
    from fastapi import HTTPException

    def end(*_: Any) -> None:
        server.should_exit = True

    def break_off(*_: Any) -> None:
        # The thread that generates must not outlive the server: Python cannot end while it computes.
        if server.should_exit:
            raise HTTPException(503, "The server is being stopped.")

    handle = model.register_forward_pre_hook(break_off)
    before = {}
    if threading.current_thread() is threading.main_thread():
        # The server puts its own in place of these, and afterwards raises what it caught again.
        before = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        handle.remove()
        for number, handler in before.items():
            signal.signal(number, handler)
