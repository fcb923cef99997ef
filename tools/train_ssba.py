"""Train the encoder of the SSBA trigger and the decoder that reads its secret (StegaStamp, Tancik et al. 2020).

Loss: cross-entropy of the bits + weight * (mean squared residual + the same where the image is smooth, which is where
the eye would see it). The weight grows from 0 once the bits are read. The secret that the attack uses is fixed and
stored with the networks. Ends with the bit accuracy and the PSNR on test images.

The default 800 steps suffice at 32x32 on a CPU (about 5 minutes on 2 cores); on a GPU give --steps 20000 --batch_size 256.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from utils import args
from utils.dataloader_bd import to_device
from utils.datasets import DATASETS
from utils.device import choose_runtime, send
from utils.errors import UserError, run_script
from utils.files import check_outputs, json_writer, make_folder, tensor_writer, write_together
from utils.loading import load_dataset
from utils.paths import ROOT, shown
from utils.seeding import generator
from utils.SSBA.encode_image import ENCODER, decode_images, encode_images
from utils.SSBA.model import BITS, SIZE, Decoder, Encoder
from utils.weights import not_finite

FLAT = 0.05  # an edge of this height (share of the pixel range) halves the weight of the smooth-region term
READ = 0.25  # cross-entropy of the bits under which the image term begins to grow


def get_parser():
    parser = args.Parser(__doc__)
    names = [name for name, spec in DATASETS.items() if spec.size == SIZE]
    parser.add_argument("--dataset", nargs="+", choices=names, default=["fashion"], help="data sets of training images")
    parser.add_argument("--data_root", type=args.path, default=ROOT / "dataset", help="folder that holds the data sets")
    parser.add_argument("--steps", type=args.number(int, 20), default=800, help="batches in all")
    parser.add_argument("--batch_size", type=args.positive_int, default=64, help="images a batch")
    parser.add_argument("--lr", type=args.positive, default=2e-3, help="largest learning rate of Adam; a cosine to 0")
    parser.add_argument("--image_weight", type=args.positive, default=20.0, help="final weight of the image terms")
    parser.add_argument("--ramp", type=args.positive_int, default=300, help="steps over which that weight grows")
    parser.add_argument("--seed", type=args.natural, default=0, help="decides the secret, first weights and batches")
    parser.add_argument(
        "--out", type=args.file_beside(".json"), default=ENCODER, help="file of encoder, decoder and secret"
    )
    args.add_device_options(parser, decodes=False)
    args.add_overwrite_option(parser, "an encoder that is there, such as the bundled one, and its record beside it")
    return parser


def image_terms(images, residual):
    """Mean squared residual, and the same weighted by how smooth the image is there; two scalars."""
    grey = images.mean(1, keepdim=True)
    edge = F.max_pool2d(grey, 3, 1, 1) + F.max_pool2d(-grey, 3, 1, 1)  # largest difference to a neighbour
    squared = residual.square()
    return squared.mean(), (squared * FLAT / (FLAT + edge)).mean()


def measure(images, path):
    """(share of bits read right, PSNR in dB, mean over images, spread of the residual between images in grey levels)."""
    encoded = encode_images(images, path)
    bits, secret = decode_images(encoded, path)
    difference = encoded.astype(float) - images
    psnr = 10 * np.log10(255**2 / np.maximum((difference**2).mean((1, 2, 3)), 1e-3))
    return float((bits == secret).mean()), float(psnr.mean()), float(difference.std(0).mean())


def main(argv=None):
    opt = get_parser().parse_args(argv)
    record = opt.out.with_suffix(".json")
    check_outputs([opt.out, record], opt.overwrite)
    runtime = choose_runtime(opt.device, opt.precision, deterministic=opt.deterministic)
    print(f"Running on {runtime}", flush=True)
    data = [load_dataset(name, opt.data_root) for name in opt.dataset]
    least = min(len(dataset.train_images) for dataset in data)  # as many of each data set
    images = np.concatenate([dataset.train_images[:: len(dataset.train_images) // least][:least] for dataset in data])
    images = to_device(images, runtime)
    make_folder(opt.out.absolute().parent, "--out")

    torch.manual_seed(opt.seed)
    encoder, decoder = runtime.place(Encoder()), runtime.place(Decoder())
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=opt.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, opt.lr, opt.steps, pct_start=0.1)
    rng = generator(opt.seed, "ssba batches")
    secret = torch.from_numpy(generator(opt.seed, "ssba secret").integers(0, 2, BITS).astype(np.uint8))

    started, grown, shown_loss = time.perf_counter(), 0, None
    for step in tqdm(range(opt.steps), "train_ssba", disable=None):
        rows = torch.from_numpy(rng.integers(0, len(images), opt.batch_size))
        batch = images[send(rows, runtime.device)].float() / 255
        bits = send(torch.from_numpy(rng.integers(0, 2, (opt.batch_size, BITS))).float(), runtime.device)
        with runtime.autocast():
            residual = encoder(batch, bits).float()
            encoded = (batch + residual).clamp(0, 1)
            encoded = encoded + ((255 * encoded).round() / 255 - encoded).detach()  # the decoder sees whole bytes
            logits = decoder(encoded).float()
        of_bits = F.binary_cross_entropy_with_logits(logits, bits)
        squared, smooth = image_terms(batch, residual)
        weight = opt.image_weight * min(1.0, grown / opt.ramp)
        loss = of_bits + weight * (squared + smooth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:  # reading a number waits for the device
            shown_loss = of_bits.item()
        grown += shown_loss < READ
        if step % 250 == 0 or step + 1 == opt.steps:
            accuracy = ((logits > 0) == bits.bool()).float().mean().item()
            psnr = -10 * torch.log10((encoded - batch).square().mean()).item()
            print(f"step {step + 1}/{opt.steps}  bits {of_bits.item():.4f}  accuracy {100 * accuracy:.2f}  "
                  f"PSNR {psnr:.2f}  image weight {weight:.1f}  {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
        if not np.isfinite(shown_loss):
            raise UserError(f"the loss is not finite at step {step + 1}; use a smaller --lr")

    state = {name: {key: value.cpu() for key, value in network.state_dict().items()}
             for name, network in (("encoder", encoder), ("decoder", decoder))}  # fmt: skip
    if any(map(not_finite, state.values())):
        raise UserError(f"the weights are not finite after step {opt.steps}; nothing is written. Use a smaller --lr")
    save, results = tensor_writer({**state, "secret": secret}), {}
    with tempfile.TemporaryDirectory() as folder:  # the encoder that is there stays until this one is measured
        made = Path(folder) / "encoder.pt"
        write_together({made: save})
        measured = [measure(dataset.test_images[:2000], made) for dataset in data]
    for dataset, (accuracy, psnr, spread) in zip(data, measured, strict=True):
        results[dataset.name] = {"bit_accuracy": accuracy, "psnr_db": psnr, "residual_spread": spread}
        print(f"{dataset.name}, {min(2000, len(dataset.test_images))} test images: bit accuracy {100 * accuracy:.2f} %, "
              f"PSNR {psnr:.2f} dB, the residual varies by {spread:.2f} grey levels between images")  # fmt: skip
    options = {
        name: getattr(opt, name) for name in ("dataset", "steps", "batch_size", "lr", "image_weight", "ramp", "seed")
    }
    minutes = round((time.perf_counter() - started) / 60, 1)
    write_together({opt.out: save, record: json_writer({"options": options, "held_out": results, "minutes": minutes})})
    print(f"The encoder is {shown(opt.out)}")


if __name__ == "__main__":
    run_script(main)
