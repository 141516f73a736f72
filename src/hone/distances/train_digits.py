"""Make the classifier of digits that ships.

    python -m hone.distances.train_digits

It learns from the 1,397 training images of the data `digits`, moved by up to one pixel and with some noise, and prints
its accuracy on the 400 that are held out.
"""

from __future__ import annotations

import torch
from safetensors.torch import save

from hone.data.arrays import Digits
from hone.diffusion.encoders import DIGIT_CLASSES, DIGIT_WIDTH, DIGITS, Encoder, train_classifier
from hone.files import write_whole


def moved(arrays: torch.Tensor, across: int, down: int) -> torch.Tensor:
    """Return images (N, 1, 8, 8) moved by some pixels, with black where nothing comes from.

    Args:
        arrays: in [-1, 1].
        across: pixels to the right.
        down: pixels downwards.
    """
    found = torch.full_like(arrays, -1.0)
    rows, columns = slice(max(0, down), 8 + min(0, down)), slice(max(0, across), 8 + min(0, across))
    there, here = slice(max(0, -down), 8 - max(0, down)), slice(max(0, -across), 8 - max(0, across))
    found[:, :, rows, columns] = arrays[:, :, there, here]
    return found


def train(steps: int = 3000) -> Encoder:
    """Return the trained network.

    Args:
        steps: of Adam.
    """
    shown = Digits(conditional=True).collection("train")
    copies = [moved(shown.arrays, across, down) for across in (-1, 0, 1) for down in (-1, 0, 1)]
    arrays, labels = torch.cat([shown.arrays] * 9 + copies), shown.labels.repeat(18)
    return train_classifier(arrays, labels, DIGIT_CLASSES, width=DIGIT_WIDTH, steps=steps, noise=0.2)


def main() -> None:
    """Train, say how well it does, and write the weights."""
    network, held = train(), Digits(conditional=True).collection("eval")
    accuracy = (network(held.arrays).argmax(1) == held.labels).double().mean()
    write_whole(DIGITS, save({name: t.contiguous() for name, t in network.state_dict().items()}))
    print(f"{DIGITS.name}: accuracy {accuracy:.4f} on {len(held)} held-out digits, {DIGITS.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
