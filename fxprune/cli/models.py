"""Models by name, for the command line: a user's own, one of a library's with random weights, or a configuration's."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.cli.objects import call, find_object, run_file
from fxprune.passes.errors import PruneError

IMAGE_SIZE = 224
IMAGE_SIZES = {"inception_v3": 299, "quantized_inception_v3": 299}
FRAMES = 16
TOKENS = 16
# Their builders warn unless told how to draw the first weights; random ones of any kind do here.
TOLD_HOW_TO_START = frozenset({"googlenet", "inception_v3", "quantized_googlenet", "quantized_inception_v3"})
FORMS = "file.py:model, package.module:function, torchvision:resnet50, timm:resnet50 or hf:folder"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a command line says of a model besides its name.

    Attributes:
        input_size: the shape of one sample, without the batch; None for the model's own.
        batch_size: of the example inputs that are made up; None for 1.
        num_classes: of a classifier that is built; None for its own.
        weights: a file with a state dict, or None.
        device: where the model is put.
    """

    input_size: tuple[int, ...] | None = None
    batch_size: int | None = None
    num_classes: int | None = None
    weights: str | None = None
    device: str = "cpu"

    def images(self, *size: int) -> Tensor:
        """Random images: of a given size (channels first), or one of which the height and width, or both alike, are wanted."""
        given = self.input_size or ()
        given = given * 2 if len(given) == 1 else given  # height and width
        return torch.randn(self.batch_size or 1, *size[: len(size) - len(given)], *given)


def load(source: str, wanted: Wanted | None = None) -> tuple[nn.Module, Any]:
    """The model that a command line names, and example inputs for it.

    Arguments:
        source: `model.py` (a file that defines `model` and `example_inputs`), `file.py:name` or `package.module:name` (a
            module, or a function that returns one, perhaps with example inputs), `torchvision:NAME`, `timm:NAME`, or
            `hf:PATH` of a folder or `config.json` of transformers.
        wanted: what else it says.

    Models that are built have random weights and are in evaluation mode. Raises: PruneError where there is no such model.
    """
    wanted = wanted or Wanted()
    library, colon, name = source.partition(":")
    model, example_inputs = LIBRARIES[library](name, wanted) if colon and library in LIBRARIES else own_model(source, wanted)
    if wanted.weights is not None:
        load_weights(model, wanted.weights)
    try:
        model.to(wanted.device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise PruneError(f"the model cannot be put on {wanted.device}: {reason}", fix="--device cpu") from error
    return model, on_device(example_inputs, wanted.device)


def on_device(value: Any, device: str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if type(value) in (tuple, list):
        return type(value)(on_device(v, device) for v in value)
    return {k: on_device(v, device) for k, v in value.items()} if isinstance(value, dict) else value


def own_model(source: str, wanted: Wanted) -> tuple[nn.Module, Any]:
    """A model of the user's."""
    path = Path(source)
    if ":" not in source and not path.is_file():
        raise PruneError(f"there is no file {source}", fix=FORMS)
    if ":" not in source and path.suffix != ".py":
        run_file(path)  # says that it is no Python
    found, module = find_object(source, "model", "model")
    inputs = getattr(module, "example_inputs", None)
    if not isinstance(found, nn.Module) and callable(found):
        found = build(found, source, wanted)
        if isinstance(found, tuple) and len(found) == 2:
            found, inputs = found
    elif wanted.num_classes is not None:
        raise PruneError("--num-classes is for models that are built here", where=source, fix="the name of a function")
    name = source.rpartition(":")[2] if ":" in source else "model"
    if not isinstance(found, nn.Module):
        kind = type(found).__name__
        raise PruneError(f"`{name}` is of type {kind}, not a torch.nn.Module", where=source, fix=f"{name} = Net()")
    if wanted.input_size is not None:
        inputs = wanted.images()
    elif inspect.isroutine(inputs):
        inputs = call(inputs, "example_inputs")
    if inputs is None:
        what = "the file defines no `example_inputs`"
        raise PruneError(what, where=source, fix="define `example_inputs` at its top level, or --input-size 3x224x224")
    return found, inputs


def build(function: Callable[..., Any], source: str, wanted: Wanted) -> Any:
    """What a function of the user's returns, or a class makes."""
    given: dict[str, Any] = {}
    if wanted.num_classes is not None:
        try:
            takes = inspect.signature(function).parameters
        except (TypeError, ValueError):
            takes = {}  # type: ignore[assignment]
        if not any(n == "num_classes" or p.kind is inspect.Parameter.VAR_KEYWORD for n, p in takes.items()):
            raise PruneError("the function takes no num_classes", where=source, fix="leave --num-classes out")
        given["num_classes"] = wanted.num_classes
    return call(function, source, **given)


def from_torchvision(name: str, wanted: Wanted) -> tuple[nn.Module, Any]:
    torchvision = library_called("torchvision")
    models = torchvision.models
    if name not in models.list_models():
        raise unknown("torchvision", name, models.list_models())
    builder = models.get_model_builder(name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # else it is downloaded
    if name in TOLD_HOW_TO_START:
        options["init_weights"] = False
    if wanted.num_classes is not None:
        options["num_classes"] = wanted.num_classes
    size = IMAGE_SIZES.get(name, IMAGE_SIZE)
    frames = (FRAMES,) if builder.__module__.startswith("torchvision.models.video") else ()
    model: nn.Module = call(builder, f"torchvision:{name}", **options)
    return model.eval(), wanted.images(3, *frames, size, size)


def from_timm(name: str, wanted: Wanted) -> tuple[nn.Module, Any]:
    timm = library_called("timm")
    if not timm.is_model(name):
        raise unknown("timm", name, timm.list_models())
    options: dict[str, Any] = {} if wanted.num_classes is None else {"num_classes": wanted.num_classes}
    size = wanted.input_size
    size = size * 2 if size is not None and len(size) == 1 else size
    try:  # position embeddings are made for a size
        model = timm.create_model(name, pretrained=False, **({"img_size": size[-2:]} if size else {}), **options)
    except TypeError:
        model = call(timm.create_model, f"timm:{name}", name, pretrained=False, **options)
    return model.eval(), wanted.images(*model.pretrained_cfg["input_size"])


def from_transformers(name: str, wanted: Wanted) -> tuple[nn.Module, Any]:
    """A model of a configuration, with its weights where they lie beside it; nothing is downloaded."""
    transformers = library_called("transformers")
    path = Path(name)
    file = path if path.suffix == ".json" else path / "config.json"
    if not file.is_file():
        raise PruneError(f"there is no {file}", fix="hf: with a folder that holds a config.json, or with such a file")
    options: dict[str, Any] = {} if wanted.num_classes is None else {"num_labels": wanted.num_classes}
    config = call(transformers.AutoConfig.from_pretrained, str(path), str(path), local_files_only=True, **options)
    kind = next((getattr(transformers, n, None) for n in config.architectures or ()), None) or transformers.AutoModel
    stored = path != file and any(path.glob("*.safetensors"))
    with without_logs(transformers.utils.logging):
        if stored and wanted.weights is None:
            model: Any = call(kind.from_pretrained, str(path), str(path), config=config, local_files_only=True)
        else:
            build_it = kind.from_config if kind is transformers.AutoModel else kind._from_config
            model = call(build_it, str(path), config)
    return model.eval(), transformers_inputs(model, config, wanted)


@contextlib.contextmanager
def without_logs(logging: Any) -> Iterator[None]:
    """Errors alone, and no bar of progress, while transformers loads a model."""
    before, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bar:
            logging.enable_progress_bar()


def transformers_inputs(model: Any, config: Any, wanted: Wanted) -> Any:
    """Inputs of the kind that a model of transformers says it takes."""
    name, batch = model.main_input_name, wanted.batch_size or 1
    if name == "input_ids":
        length = (wanted.input_size or (TOKENS,))[-1]
        vocabulary = config.get_text_config().vocab_size
        inputs: dict[str, Any] = {name: torch.arange(length).remainder(vocabulary).repeat(batch, 1)}
        if config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs[name].clone()
        return inputs | ({"use_cache": False} if hasattr(config, "use_cache") else {})
    if name == "pixel_values":
        size = getattr(config, "image_size", IMAGE_SIZE)
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {name: wanted.images(getattr(config, "num_channels", 3), *sides)}
    if wanted.input_size is None:
        raise PruneError(f"what {type(model).__name__} takes as {name} is not known", fix="--input-size 80x3000, say")
    return {name: wanted.images()}


LIBRARIES = {"torchvision": from_torchvision, "timm": from_timm, "hf": from_transformers}


def library_called(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise PruneError(f"{name} is not installed", fix=f"pip install {name}") from error


def unknown(library: str, name: str, known: Sequence[str]) -> PruneError:
    close = difflib.get_close_matches(name, known, n=3)
    fix = " or ".join(f"{library}:{c}" for c in close) or f"one of the names of {library}'s list_models()"
    return PruneError(f"{library} has no model called {name!r}", fix=fix)


def load_weights(model: nn.Module, path: str) -> None:
    """Fill a model with a state dict of a file: safetensors, or what `torch.save` wrote. Nothing in it is executed."""
    file = Path(path)
    if not file.is_file():
        raise PruneError(f"there is no file {path}", fix="--weights with a .safetensors or .pt file")
    try:
        if file.suffix == ".safetensors":
            state: Any = importlib.import_module("safetensors.torch").load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        what = f"the weights cannot be read: {type(error).__name__}: {str(error).splitlines()[0]}"
        raise PruneError(what, where=path, fix="a state dict") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        lines = [line.strip() for line in str(error).splitlines()]
        what = f"the weights do not fit the model: {lines[min(1, len(lines) - 1)]}"
        raise PruneError(what, where=path, fix="the state dict of this very model") from error
