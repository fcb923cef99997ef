"""torchvision's ImageNet weights, or a file of such weights."""

from urllib.error import URLError

import torchvision

from utils.errors import UserError
from utils.files import load_tensors
from utils.weights import load_weights

NAMES = ("resnet18", "resnet34", "resnet50")


def load_pretrained(model, name, source):
    """Start a network with the 7x7 stem from weights trained on ImageNet; the last layer keeps its own.

    Args:
        model: a `resnet.ResNet`; name: its name in `resnet.MODELS`; source: "imagenet" (torchvision's IMAGENET1K_V1,
        downloaded once), "none", or the path of a state dict such as torchvision hands out.

    Raises:
        UserError: where there are no such weights, they cannot be downloaded, or do not fit.
    """
    if source == "none":
        return
    advice = "give --pretrained none to start from random weights, or the path of a file of weights"
    if source == "imagenet":
        if name not in NAMES:
            raise UserError(f"torchvision has no ImageNet weights of {name}; {advice}")
        weights = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        try:
            state = weights.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError, RuntimeError) as error:
            raise UserError(f"cannot download torchvision's weights of {name} ({error}); {advice}") from None
    else:
        weights = torchvision.models.get_model_weights(name if name in NAMES else NAMES[0]).IMAGENET1K_V1
        command = f"curl -O {weights.url}"
        state = load_tensors(source, command, "file of weights")
    own = {key: value for key, value in model.state_dict().items() if key.startswith("fc.")}
    state = state if isinstance(state, dict) else {}
    load_weights(
        model, {**{key: value for key, value in state.items() if not str(key).startswith("fc.")}, **own}, source
    )
