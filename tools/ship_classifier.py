"""Train the classifier that judges and put it into the package: `python tools/ship_classifier.py --data_dir FOLDER`.

FOLDER holds the original files of Fashion-MNIST. About ten minutes on two cores that compute bfloat16. Beside the weights
(half precision) and the card goes `reference.safetensors`: mean and covariance of the test and the training set,
on the classifier's features and on the brightness and contrast of patches.
`--weights FILE` ships weights trained before by the same recipe, and `--card FILE` takes the notes of their training.
"""
import argparse
import json
import time
from pathlib import Path

import torch

from diffusion_book.classifier import SHIPPED, Classifier, accuracy, in_batches, load_classifier, train_classifier
from diffusion_book.images import fill, load_full_fashion, pick_precision, read_tensors, write_json, write_tensors
from diffusion_book.metrics import Moments, patch_features

LICENCE = "Apache-2.0; trained on Fashion-MNIST, MIT, Copyright (c) 2017 Zalando SE"


def train_it(images, labels, epochs: int) -> tuple:
    "The network and the notes of its training."
    start = time.perf_counter()
    def watch(net, step, loss):
        if step % 100 == 0: print(f"step {step}, loss {loss:.3f}, {time.perf_counter() - start:.0f} s", flush=True)
    net = train_classifier(images, labels, epochs, watch=watch, progress=False)
    return net, dict(epochs=epochs, batch_size=128, lr=.15, seed=0, seconds=round(time.perf_counter() - start, 1), device="cpu",
                     threads=torch.get_num_threads(), precision=pick_precision(), torch=torch.__version__)


def reference(net, sets: dict) -> tuple[dict, dict]:
    "Moments of each set in both views, as tensors, and how many images they stand for."
    tensors = {}
    for part, images in sets.items():
        for view, see in (("features", net.features), ("patches", patch_features)):
            seen = Moments()
            for x in images.split(1000): seen.update(in_batches(see, x))
            tensors |= {f"{part}.{view}.mean": seen.mean, f"{part}.{view}.cov": seen.cov}
    return tensors, dict(n={part: len(images) for part, images in sets.items()})


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--data_dir", required=True, help="folder of the original Fashion-MNIST files")
    ap.add_argument("--epochs", type=int, default=16)
    ap.add_argument("--weights", type=Path, help="a safetensors file of the network, instead of training it")
    ap.add_argument("--card", type=Path, help="a JSON file with the notes of that training")
    args = ap.parse_args()
    (train, labels), (test, test_labels) = (load_full_fashion(s, args.data_dir) for s in ("train", "test"))
    if args.weights: net, notes = fill(Classifier(), read_tensors(args.weights)[0], args.weights), json.loads(args.card.read_text())
    else: net, notes = train_it(train, labels, args.epochs)
    card = dict(kind="classifier", net=net.config, parameters=sum(p.numel() for p in net.parameters()), data="fashion-full",
                images=len(train), command="python tools/ship_classifier.py --data_dir FOLDER", **notes, licence=LICENCE, weights="float16")
    state = {k: v.half() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    write_tensors(SHIPPED/"model.safetensors", state)
    write_json(SHIPPED/"card.json", card)
    net = load_classifier()     # as a user gets it: the moments belong to the rounded weights
    card |= dict(test_accuracy=accuracy(net, test, test_labels), train_accuracy=accuracy(net, train, labels))
    write_json(SHIPPED/"card.json", card)
    tensors, sizes = reference(net, dict(test=test, train=train))
    write_tensors(SHIPPED/"reference.safetensors", tensors, sizes)
    print(json.dumps(card, indent=1))


if __name__ == "__main__": main()
